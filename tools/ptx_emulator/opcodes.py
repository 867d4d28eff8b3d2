"""What each opcode does, as the source that :class:`~tools.ptx_emulator.translate.Body` takes."""

from __future__ import annotations

import functools
from collections.abc import Callable

from tools.ptx_emulator.ptx import Instruction
from tools.ptx_emulator.translate import Body, Unsupported, access_of, is_type, kind_of

_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_FLOATS = {"f16", "bf16", "f32", "f64"}


def _elementwise(body: Body, ins: Instruction, kind: str, template: str, result: str | None = None) -> None:
    """``template`` of all operands but the result, each of dtype ``kind``."""
    operands = ins.args[1:]
    expression = template.format(*(body.value(x, kind) for x in operands))
    some = any(body.is_register(x.removeprefix("!")) or x.startswith("%") for x in operands)
    body.define(ins, ins.args[0], result or kind, expression, whole=some)


def _halves(body: Body, ins: Instruction, template: str) -> None:
    """16-bit floats, one or two in a register: exact in fp64, then rounded."""
    type_ = ins.op[-1]
    pairs, bf16 = type_.endswith("x2"), type_.startswith("bf16")
    wide = "from_bf16({}).astype(f8)" if bf16 else "{}.view(f2).astype(f8)"
    rounded = "to_bf16(({}).astype(f4))" if bf16 else "({}).astype(f2).view(u2)"
    parts = []
    for i in range(2 if pairs else 1):
        bits = [body.value(x, "u4" if pairs else "u2", whole=True) for x in ins.args[1:]]
        numbers = [wide.format(f"part({x}, {i}, 2)" if pairs else x) for x in bits]
        parts.append(rounded.format(template.format(*numbers)))
    body.define(ins, ins.args[0], "u4" if pairs else "u2", f"join([{', '.join(parts)}])")


def _arithmetic(template: str, of_fp32: str | None = None):
    """Integers by the template, unsigned, as they wrap around."""

    def add(body: Body, ins: Instruction) -> None:
        if ins.op[-1] in ("f16", "bf16", "f16x2", "bf16x2"):
            return _halves(body, ins, template)
        kind = kind_of(ins.op[-1])
        if kind[0] in "ui":
            _elementwise(body, ins, f"u{kind[1]}", template)
        else:
            _elementwise(body, ins, kind, of_fp32 if of_fp32 and kind == "f4" else template)
        return None

    return add


def _typed(of_integers: str, of_floats: str | None = None):
    """By the template, with operands of the instruction's own type."""

    def add(body: Body, ins: Instruction) -> None:
        if "NaN" in ins.op:
            raise Unsupported(ins.text)
        kind = kind_of(ins.op[-1])
        _elementwise(body, ins, kind, of_floats if of_floats and kind[0] == "f" else of_integers)

    return add


def _product(body: Body, ins: Instruction) -> None:
    """``mul`` and ``mad``: the low half, the high half or, wide, all of the product."""
    added = " + {2}" if ins.op[0] == "mad" else ""
    if ins.op[1] not in ("wide", "hi"):
        return _arithmetic("{0} * {1}" + added)(body, ins)
    kind = kind_of(ins.op[-1])
    if ins.op[1] == "wide":
        wide = f"{kind[0]}{2 * int(kind[1])}"
        a, b = (f"{body.value(x, kind, whole=True)}.astype({wide})" for x in ins.args[1:3])
        c = [body.value(x, wide) for x in ins.args[3:]]
        body.define(ins, ins.args[0], wide, f"{a} * {b}" + added.format(None, None, *c))
    else:
        _elementwise(body, ins, kind, "high_product({0}, {1})" + added)
    return None


def _shift(template: str):
    def add(body: Body, ins: Instruction) -> None:
        kind = kind_of(ins.op[-1])
        operands = body.value(ins.args[1], kind, whole=True), body.value(ins.args[2], "u4")
        body.define(ins, ins.args[0], kind, template.format(*operands))

    return add


def _extract(body: Body, ins: Instruction) -> None:
    kind = kind_of(ins.op[-1])
    at = [body.value(x, "u4") for x in ins.args[2:]]
    a = body.value(ins.args[1], kind, whole=True)
    body.define(ins, ins.args[0], kind, f"extract({a}, {at[0]}, {at[1]})")


def _select(body: Body, ins: Instruction) -> None:
    result, a, b, condition = ins.args
    kind = body.code.homes[result]
    chosen = f"np.where({body.value(condition, '?')}, {body.value(a, kind)}, {body.value(b, kind)})"
    body.define(ins, result, kind, chosen)


def _compare(body: Body, ins: Instruction) -> None:
    """``setp``: floats that are NaN are unequal to all, and true of a comparison that ends with u."""
    name, kind = ins.op[1], kind_of(ins.op[-1])
    a, b = (body.value(x, kind, whole=True) for x in ins.args[1:3])
    unordered = f"(np.isnan({a}) | np.isnan({b}))"
    if name == "num":
        found = f"(~{unordered})"
    elif name == "nan":
        found = unordered
    else:
        found = f"({a} {_COMPARISONS[name[:2]]} {b})"
    if kind[0] == "f" and name[2:] == "u":
        found = f"({found} | {unordered})"
    elif kind[0] == "f" and name == "ne":
        found = f"({found} & ~{unordered})"
    if len(ins.args) > 3:
        symbol = {"and": "&", "or": "|", "xor": "^"}[ins.op[2]]
        found = f"({found} {symbol} {body.value(ins.args[3], '?')})"
    body.define(ins, ins.args[0], "?", found)


def _move(body: Body, ins: Instruction) -> None:
    """``mov``: also vectors to one register and back, and what a thread knows of itself."""
    result, source = ins.args
    if isinstance(source, list):
        size = int(ins.op[-1][1:]) // 8
        parts = [body.value(x, f"u{size // len(source)}", whole=True) for x in source]
        body.define(ins, result, f"u{size}", f"join([{', '.join(parts)}])")
    elif isinstance(result, list):
        size = int(ins.op[-1][1:]) // 8
        own = size // len(result)
        body.lines.append(f"t = {body.value(source, f'u{size}', whole=True)}")
        for i, name in enumerate(result):
            body.define(ins, name, f"u{own}", f"part(t, {i}, {own})")
    elif source.startswith(("%tid.", "%ctaid.", "%nctaid.")):
        name, axis = source.split(".")
        axis = "xyz".index(axis)
        values = {"%tid": "W.thread" if axis == 0 else "0", "%ctaid": f"W.program.ids[{axis}]"}
        body.define(
            ins,
            result,
            "u4",
            f"np.broadcast_to({values.get(name, f'W.program.grid[{axis}]')}, W.n).astype(u4)",
        )
    elif ins.op[-1] == "pred" and not body.is_register(source):
        body.define(ins, result, "?", str(source != "0"), whole=False)
    else:
        home = body.code.homes[result]
        body.define(ins, result, home, body.value(source, home, whole=True))


def _convert(body: Body, ins: Instruction) -> None:
    """``cvt`` between integers and floats; 16-bit floats are kept as bits."""
    result, *sources = ins.args
    to, came = [x for x in ins.op[1:] if is_type(x)]
    modes = {x for x in ins.op[1:] if not is_type(x)}
    if to in ("bf16x2", "f16x2"):
        if modes != {"rn"}:
            raise Unsupported(ins.text)
        bits = "to_bf16({})" if to == "bf16x2" else "{}.astype(f2).view(u2)"
        parts = [bits.format(body.value(x, "f4", whole=True)) for x in reversed(sources)]
        return body.define(ins, result, "u4", f"join([{', '.join(parts)}])")
    kind = {"bf16": "f4", "f16": "f2"}.get(came) or kind_of(came)
    value = body.value(sources[0], "u2" if came in ("bf16", "f16") else kind, whole=True)
    value = {"bf16": f"from_bf16({value})", "f16": f"{value}.view(f2)"}.get(came, value)
    if to == "tf32" and modes == {"rna"}:
        body.define(ins, result, "u4", f"to_tf32({value})")
    elif to not in _FLOATS:
        target = kind_of(to)
        if came in _FLOATS:
            (mode,) = modes & {"rzi", "rni", "rmi", "rpi"}
            value = f"to_integer({value}, {target}, '{mode}')"
        body.define(ins, result, target, f"{value}.astype({target})")
    elif modes - {"rn"}:
        raise Unsupported(ins.text)
    elif to == "bf16":
        body.define(ins, result, "u2", f"to_bf16({value}.astype(f4))")
    elif to == "f16":
        body.define(ins, result, "u2", f"{value}.astype(f2).view(u2)")
    else:
        body.define(ins, result, kind_of(to), f"{value}.astype({kind_of(to)})")
    return None


def _load(body: Body, ins: Instruction) -> None:
    if ins.op[1] == "param":
        size = body.code.widths[ins.args[0]] // 8
        value = f"W.program.parameters[{body.code.parameters[ins.args[1].base]}] & {2 ** (8 * size) - 1}"
        return body.define(ins, ins.args[0], f"u{size}", value, whole=False)
    space, size = access_of(ins.op)
    names = ins.args[0] if isinstance(ins.args[0], list) else [ins.args[0]]
    mask, before = body.mask(ins), "None"
    if mask is not None:
        before = f"[{', '.join('None' if x == '_' else body.value(x, f'u{size}') for x in names)}]"
    place = body.code.place(ins)
    at = body.address(ins.args[1], space)
    call = f"W.load('{space}', {at}, {size}, {len(names)}, {mask}, {before}, {place})"
    if ins.op[-1][0] == "s":
        body.lines.append(f"t = [x.view(i{size}) for x in {call}]")
        call = "t"
    return body.define_all(ins, names, f"{'i' if ins.op[-1][0] == 's' else 'u'}{size}", call, merged=True)


def _store(body: Body, ins: Instruction) -> None:
    space, size = access_of(ins.op)
    sources = ins.args[1] if isinstance(ins.args[1], list) else [ins.args[1]]
    values = ", ".join(body.value(x, f"u{size}", whole=True) for x in sources)
    at = body.address(ins.args[0], space)
    body.lines.append(
        f"W.store('{space}', {at}, [{values}], {size}, {body.mask(ins)}, {body.code.place(ins)})"
    )


def _load_matrices(body: Body, ins: Instruction) -> None:
    names = ins.args[0]
    at, place = body.address(ins.args[1], "shared"), body.code.place(ins)
    body.define_all(ins, names, "u4", f"W.load_matrices({at}, {len(names)}, {'trans' in ins.op}, {place})")


def _matrix_product(body: Body, ins: Instruction) -> None:
    result, *operands = ins.args
    types = [x for x in ins.op if is_type(x)]
    if types[0] != "f32" or types[1] not in ("tf32", "bf16", "f16") or body.parted:
        raise Unsupported(ins.text)
    lists = [", ".join(body.value(x, kind) for x in part) for part, kind in zip(operands, ("u4", "u4", "f4"))]
    call = f"W.product('{types[1]}', {', '.join(f'[{x}]' for x in lists)})"
    body.define_all(ins, result, "f4", call)


def _shuffle(body: Body, ins: Instruction) -> None:
    result, *rest = ins.args[0].split("|")
    values = ", ".join(body.value(x, "u4") for x in ins.args[1:4])
    body.lines.append(f"t = W.shuffle('{ins.op[2]}', {values})")
    body.define(ins, result, "u4", "t[0]")
    for name in rest:
        body.define(ins, name, "?", "t[1]")


def _reduce(body: Body, ins: Instruction) -> None:
    kind = kind_of(ins.op[-1])
    value, members = body.value(ins.args[1], kind), body.value(ins.args[2], "u4")
    body.define(ins, ins.args[0], kind, f"W.reduce('{ins.op[2]}', {value}, {members})")


def _copy(body: Body, ins: Instruction) -> None:
    """``cp.async``."""
    if ins.op[2] == "commit_group":
        body.lines.append("W.commit_copies()")
    elif ins.op[2] == "wait_group":
        body.lines.append(f"W.wait_for_copies({int(ins.args[0], 0)})")
    else:
        to, came = body.address(ins.args[0], "shared"), body.address(ins.args[1], "global")
        size = int(ins.args[2], 0)
        given = body.value(ins.args[3], "u4") if len(ins.args) > 3 else size
        body.lines.append(f"W.copy({to}, {came}, {size}, {given}, {body.mask(ins)}, {body.code.place(ins)})")


def _warp_barrier(body: Body, ins: Instruction) -> None:
    body.lines.append("W.program.pass_warp_barrier()")


OPCODES: dict[str, Callable[[Body, Instruction], None]] = {
    "add": _arithmetic("{0} + {1}"),
    "sub": _arithmetic("{0} - {1}"),
    "fma": _arithmetic("{0} * {1} + {2}", of_fp32="fused({0}, {1}, {2})"),
    "mul": _product,
    "mad": _product,
    "div": _typed("divide({0}, {1})", "{0} / {1}"),
    "rem": _typed("remainder({0}, {1})"),
    "min": _typed("np.minimum({0}, {1})", "np.fmin({0}, {1})"),
    "max": _typed("np.maximum({0}, {1})", "np.fmax({0}, {1})"),
    "neg": _typed("np.negative({0})"),
    "abs": _typed("np.abs({0})"),
    "and": _typed("{0} & {1}"),
    "or": _typed("{0} | {1}"),
    "xor": _typed("{0} ^ {1}"),
    "not": _typed("~{0}"),
    "ex2": _typed("np.exp2({0})"),
    "lg2": _typed("np.log2({0})"),
    "sqrt": _typed("np.sqrt({0})"),
    "rsqrt": _typed("1 / np.sqrt({0})"),
    "rcp": _typed("1 / {0}"),
    "shl": _shift("shift_left({0}, {1})"),
    "shr": _shift("shift_right({0}, {1})"),
    "bfe": _extract,
    "prmt": functools.partial(_elementwise, kind="u4", template="permute({0}, {1}, {2})"),
    "selp": _select,
    "setp": _compare,
    "mov": _move,
    "cvt": _convert,
    "ld": _load,
    "st": _store,
    "ldmatrix": _load_matrices,
    "mma": _matrix_product,
    "shfl": _shuffle,
    "redux": _reduce,
    "cp": _copy,
    "bar": _warp_barrier,
}
