"""Compile planned kernel calls for GPUs that need not be present.

Cannot share a process with the Triton interpreter, which replaces the language that the compiler reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from nl_kernels.triton_support.kernel_call import Argument, KernelCall
from nl_kernels.triton_support.targets import TARGETS


def signature_of(call: KernelCall) -> dict[str, str | tuple[str, ...]]:
    """Argument types in the kernel's order, as ``triton.compile`` spells them."""
    types = {name: _type_of(name, value) for name, value in call.arguments.items()}
    types |= dict.fromkeys(call.constants, "constexpr")
    return {name: types[name] for name in call.kernel.arg_names}


def compile_call(call: KernelCall, architecture: str) -> Any:
    """The compiled kernel (``asm``, ``metadata``) of ``call`` for an architecture in :data:`TARGETS`.

    Pointers are taken as 16-byte aligned, as PyTorch's allocators make them.

    Raises:
        RuntimeError: this process interprets Triton kernels.
    """
    from triton.compiler import compile

    source, target, options = _prepared(call, architecture)
    return compile(source, target=target, options=options)


def intermediate_code(call: KernelCall, architecture: str) -> str:
    """Triton's own code of ``call``, inlined, before anything of the GPU is in it: takes no compiler.

    Raises:
        RuntimeError: this process interprets Triton kernels.
    """
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    source, target, given = _prepared(call, architecture)
    backend = make_backend(target)
    options = backend.parse_options(given)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(target, options, functions, modules, context)
    stages: dict[str, Callable[..., Any]] = {}
    backend.add_stages(stages, options, source.language)
    return str(stages["ttir"](module, {}))


def _prepared(call: KernelCall, architecture: str) -> tuple[Any, Any, dict[str, Any]]:
    """What ``triton.compile`` takes: source, target, options."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    if not isinstance(call.kernel, JITFunction):
        raise RuntimeError("compiling ahead of time needs a process without TRITON_INTERPRET")
    target = TARGETS[architecture]
    signature = signature_of(call)
    absent = {
        path: None
        for position, name in enumerate(signature)
        if name in call.arguments
        for path, part in _leaves(position, call.arguments[name])
        if part is None
    }
    aligned = {
        path: [["tt.divisibility", 16]]
        for position, kind in enumerate(signature.values())
        for path, part in _leaves(position, kind)
        if part.startswith("*")
    }
    source = ASTSource(call.kernel, signature, {**call.constants, **absent}, aligned)
    options = {"num_warps": call.num_warps, "num_stages": call.num_stages, "enable_fp_fusion": True}
    return source, GPUTarget(target.backend, target.compiler_arch, target.threads_per_warp), options


_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


def _leaves(position: int, kind: Any) -> Iterator[tuple[tuple[int, ...], Any]]:
    """The types or values of one argument, a tuple's one by one, and where they are."""
    if isinstance(kind, tuple):
        yield from (((position, index), part) for index, part in enumerate(kind))
    else:
        yield (position,), kind


def _type_of(name: str, value: Argument | tuple[Argument, ...]) -> str | tuple[str, ...]:
    if value is None:
        return "constexpr"
    if isinstance(value, tuple):
        parts = [_type_of(name, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, int):
        return "i32" if abs(value) < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"{name}: expected a tensor, int, float or None, got {type(value).__name__}")
