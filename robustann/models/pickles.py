"""What a pickle would do, read from its opcodes; nothing is unpickled."""

from __future__ import annotations

import io
import pickletools
from dataclasses import dataclass, field
from typing import Any

_MAX_OPCODES = 1_000_000
_MAX_NESTED = 3
_MAX_GLOBALS = 1000
# Hashing tuples within tuples overflows the stack, which ends the process.
_MAX_VALUE_DEPTH = 200

_UNKNOWN = "computed while unpickling"
_ADDS = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"})
_CALLS = frozenset({"REDUCE", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "BUILD"})

# All that the weights of a network need; each makes plain data. Stricter than what PyTorch's own
# weights-only unpickler admits: torch.Tensor and UntypedStorage, called with a number, would take
# any amount of memory.
_DATA = frozenset(
    {
        "collections.Counter",
        "collections.OrderedDict",
        "torch.Size",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch.device",
        "torch.nn.parameter.Parameter",
        *(
            f"torch.{name}Storage"
            for name in ("BFloat16", "Bool", "Byte", "Char", "ComplexDouble", "ComplexFloat",
                         "Double", "Float", "Half", "Int", "Long", "Short")
        ),
        *(
            f"torch.{name}"
            for name in ("bfloat16", "bool", "complex64", "complex128", "float16", "float32",
                         "float64", "int8", "int16", "int32", "int64", "uint8", "uint16",
                         "uint32", "uint64")
        ),
    }
)  # fmt: skip


@dataclass(frozen=True)
class Pickle:
    """What the opcodes of one pickle ask for.

    Attributes:
        globals: functions and classes that unpickling would import, as ``module.name``, in the
            order of their first use; those in pickles inside it too.
        calls: how many times it would call or change what it imported.
        size: bytes from its first opcode to its last.
        fault: why it cannot be read to its end; None for a whole one.
        magic: the number it holds, if it holds nothing else; old PyTorch files begin so.

    >>> Pickle(("os.system",), 1, 20, None, None).beyond_tensors
    ('os.system',)
    """

    globals: tuple[str, ...]
    calls: int
    size: int
    fault: str | None
    magic: int | None

    @property
    def beyond_tensors(self) -> tuple[str, ...]:
        """Those of the globals that no weights need."""
        return tuple(name for name in self.globals if name not in _DATA)


@dataclass
class Budget:
    """How many opcodes may still be read, in one pickle or in several and in those inside them.

    A short file can unpack to billions of them.

    >>> scan_pickle(b"(N0N0N0N0N.", budget=Budget(5)).fault
    'more opcodes than are looked at (1000000) or more than 1000 globals'
    """

    opcodes: int = field(default_factory=lambda: _MAX_OPCODES)


def scan_pickle(
    content: bytes | memoryview, start: int = 0, budget: Budget | None = None
) -> Pickle:
    """Read one pickle from ``start``, opcode by opcode.

    What is beyond the ``budget`` is not read, which counts as a fault.

    >>> import pickle
    >>> scan_pickle(pickle.dumps(print)).globals
    ('builtins.print',)
    >>> scan_pickle(pickle.dumps([1, 2])[:-1]).fault
    'pickle exhausted before seeing STOP'
    """
    return _scan(io.BytesIO(content), start, 0, Budget() if budget is None else budget)


def _scan(stream: io.BytesIO, start: int, depth: int, budget: Budget) -> Pickle:
    stream.seek(start)
    found: dict[str, None] = {}
    # What is on the stack, as far as it matters: text, _MARK, or how deeply a value is nested.
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    calls = opcodes = 0
    magic = fault = None
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            opcodes += 1
            budget.opcodes -= 1
            if budget.opcodes < 0 or len(found) > _MAX_GLOBALS:
                fault = (
                    f"more opcodes than are looked at ({_MAX_OPCODES}) or more than "
                    f"{_MAX_GLOBALS} globals"
                )
                break
            name = opcode.name
            calls += name in _CALLS
            if opcodes == 2 and name in ("LONG1", "LONG"):
                magic = argument
            elif name not in ("STOP", "PROTO"):
                magic = None
            if name in ("GLOBAL", "INST"):
                found[str(argument).replace(" ", ".", 1)] = None
            elif name == "STACK_GLOBAL":
                parts = stack[-2:]
                known = len(parts) == 2 and all(isinstance(part, str) for part in parts)
                found[".".join(parts) if known else f"({_UNKNOWN})"] = None
            elif name.startswith("EXT"):
                found[f"(extension {argument} of copyreg)"] = None
            if isinstance(argument, bytes | bytearray) and depth < _MAX_NESTED:
                for inner in _nested(bytes(argument), depth, budget):
                    found.setdefault(inner)
            _move(stack, memo, opcode, argument)
            if stack and isinstance(stack[-1], int) and stack[-1] > _MAX_VALUE_DEPTH:
                fault = f"values nested deeper than {_MAX_VALUE_DEPTH}"
                break
    # Damage shows as any of these, and as an encoding error, which is a ValueError.
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        fault = f"{error!s:.200}" or type(error).__name__
    return Pickle(tuple(found), calls, stream.tell() - start, fault, magic)


def _nested(content: bytes, depth: int, budget: Budget) -> tuple[str, ...]:
    """Globals of a pickle inside a pickle, which a call of ``pickle.loads`` would reach."""
    if content[:1] != b"\x80" or content[-1:] != b".":
        return ()
    return _scan(io.BytesIO(content), 0, depth + 1, budget).globals


_MARK = object()


def _move(stack: list[Any], memo: dict[int, Any], opcode: Any, argument: Any) -> None:
    """What the opcode does to the stack, as pickletools describes it."""
    name = opcode.name
    if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
        memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1] if stack else 0
        return
    if name in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo.get(argument, 0))
        return
    if name == "DUP":
        stack.append(stack[-1] if stack else 0)
        return
    taken: list[Any] = []
    if pickletools.markobject in opcode.stack_before or (name == "POP" and stack[-1:] == [_MARK]):
        while stack and (top := stack.pop()) is not _MARK:
            taken.append(top)
        above = opcode.stack_before.index(pickletools.markobject) if name != "POP" else 0
        taken += [stack.pop() for _ in range(min(above, len(stack)))]
    else:
        taken += [stack.pop() for _ in range(min(len(opcode.stack_before), len(stack)))]
    if not opcode.stack_after:
        return
    if pickletools.markobject in opcode.stack_after:
        stack.append(_MARK)
    elif not opcode.stack_before and isinstance(argument, str):
        stack.append(argument)
    else:
        *inner, last = [value if isinstance(value, int) else 0 for value in taken] or [-1]
        # What adds to a list or a dict leaves it on the stack; anything else wraps what it took.
        stack.append(max([last, *(value + 1 for value in inner)]) if name in _ADDS
                     else max([last, *inner]) + 1)  # fmt: skip
