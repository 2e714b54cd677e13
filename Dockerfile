# robustann in a container: for a processor by default, for NVIDIA GPUs with --build-arg DEVICE=cuda.
#
#   docker build -t robustann .
#   docker build -t robustann:cuda --build-arg DEVICE=cuda .
#   docker run --rm --network none --user "$(id -u):$(id -g)" -v "$PWD:/work" \
#       robustann audit --model model.safetensors --data digits
#   docker run --rm --network none --user "$(id -u):$(id -g)" --gpus all -v "$PWD:/work" \
#       robustann:cuda audit ...
#
# --user: what is written into the mounted folder belongs to you, and not to the image's user.
# --network none is how to look at models that strangers made: nothing here needs a network.
FROM python:3.12-slim

ARG DEVICE=cpu
# PyPI's wheels bring CUDA's libraries along; PyTorch's own index has smaller ones for a processor.
RUN if [ "$DEVICE" = cpu ]; then \
        pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu \
            "torch>=2.10" "torchvision>=0.25"; \
    fi

COPY pyproject.toml README.md LICENSE /src/
COPY attacks /src/attacks
COPY defenses /src/defenses
COPY reports /src/reports
COPY docs/trust.md /src/docs/trust.md
COPY robustann /src/robustann
RUN pip install --no-cache-dir /src && rm -rf /src

# Not root: a model file that breaks out of its reader should find as little as possible.
RUN useradd --create-home --uid 1000 robustann
# ART and Captum bring Matplotlib, which wants to write where another --user may not.
ENV MPLCONFIGDIR=/tmp/matplotlib
# By number, so that a cluster sees that it is not root.
USER 1000
WORKDIR /work
ENTRYPOINT ["robustann"]
CMD ["--help"]
