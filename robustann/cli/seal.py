"""``robustann seal`` and ``robustann verify``."""

from __future__ import annotations

from pathlib import Path

import click

from robustann.cli.options import check_model_file, check_targets, quiet_option

_SHOWN = 20

model_argument = click.argument("model", type=click.Path(path_type=Path), metavar="MODEL")
key_option = click.option(
    "--key-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The secret that the manifest is signed with, 16 bytes or more.  [default: none]",
)


@click.command(short_help="Write down what a model file holds.")
@model_argument
@key_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The manifest to write.  [default: MODEL.seal.json beside the model]",
)
@quiet_option
def seal(model: Path, key_file: Path | None, out: Path | None, quiet: bool) -> None:
    """Write down what a model file holds, so that 'robustann verify' can tell if it was changed.

    Covers the .safetensors file, each tensor in it, and the .json beside it. Keep the key where
    those who can write the model cannot read it.

    \b
    Example:
      openssl rand -hex 32 > key
      robustann seal model.safetensors --key-file key
    """
    from robustann.defenses.seal import manifest_path, read_key, seal_model
    from robustann.errors import UsageError
    from robustann.models.io import sidecar_path

    check_model_file(model)
    target = out or manifest_path(model)
    sealed = [model, sidecar_path(model), *([key_file] if key_file else [])]
    if target.resolve() in [path.resolve() for path in sealed]:
        raise UsageError(
            f"expected --out to name a file of its own, got '{target}', which would be "
            "overwritten; choose another one"
        )
    key = None if key_file is None else read_key(key_file)
    check_targets(target)
    manifest = seal_model(model, key=key)
    manifest.save(target)
    if not quiet:
        click.echo(f"sealed {len(manifest.tensors)} tensors of {model}")
        if manifest.sidecar_sha256 is not None:
            click.echo(f"sealed {sidecar_path(model)}")
        if key is None:
            click.echo(
                "not signed: this manifest detects accidents, not somebody who can write it too; "
                "sign it with --key-file"
            )
        click.echo(f"manifest: {target}")


@click.command(short_help="Tell whether a model file is the one that was sealed.")
@model_argument
@click.argument("manifest", required=False, type=click.Path(path_type=Path), metavar="[MANIFEST]")
@key_option
@quiet_option
def verify(model: Path, manifest: Path | None, key_file: Path | None, quiet: bool) -> None:
    """Tell whether a model file is the one that was sealed, and if not, what was changed.

    MANIFEST is what 'robustann seal' wrote (MODEL.seal.json unless named). Ends with 0 if the
    model is intact, with 4 if it is refused. Nothing in the files is run.

    \b
    Example:
      robustann verify model.safetensors model.seal.json --key-file key
    """
    from robustann.defenses.seal import Manifest, manifest_path, read_key, verify_model
    from robustann.errors import RefusedError

    check_model_file(model)
    source = manifest or manifest_path(model)
    key = None if key_file is None else read_key(key_file)
    sealed = Manifest.load(source)
    found = verify_model(model, sealed, key=key)
    if not found.intact:
        shown = "".join(f"\n  {change}" for change in found.changes[:_SHOWN])
        more = len(found.changes) - _SHOWN
        shown += f"\n  and {more} more" if more > 0 else ""
        raise RefusedError(
            f"'{model}' is refused, it is not what was sealed in '{source}':{shown}\n"
            "Copy the model again from where you trust it"
        )
    if not quiet:
        click.echo(f"intact: {found.intact_means}")
        if found.signed:
            click.echo("signature: fits the key")
        elif sealed.signature is None:
            click.echo(
                "signature: none; accidents are ruled out, somebody who can write the manifest "
                "is not"
            )
        else:
            click.echo(
                "signature: not checked, for no key was given; accidents are ruled out, somebody "
                "who can write the manifest is not"
            )
