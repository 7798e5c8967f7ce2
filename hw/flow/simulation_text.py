"""Verilog rewritten for a cycle simulator: the same registers and the same values, in a form that evaluates faster.

The converter writes every register as a next-state process, which computes and stores a value in every cycle, every
bit of a sign extension as an item of its own, every operator at its full width, and a place in a wide word as a shift
of the whole word. Synthesis undoes all of that; Verilator does not, and pays for it in every simulated cycle
(docs/decisions/simulation-speed.md has the measurements). Only the text of `build_harness` goes through here: what
is synthesised, proved and driven by cocotb is the converter's own.

Each function takes and returns the text of one module as `write_verilog -norename` prints it, where an intermediate
value is called `\\$N` and a space follows each escaped name.
"""

import re
from collections import Counter
from collections.abc import Collection
from graphlib import TopologicalSorter

from hw.flow.verilog import Design

_TEMPORARY = r"\\\$\d+"
_ASSIGN = re.compile(rf"^  assign ({_TEMPORARY})  = (.*);\n", re.M)
_WIRE = re.compile(rf"^  (wire (?:signed )?(?:\[(\d+):0\] )?)({_TEMPORARY}) ;\n", re.M)
_SLICE = re.compile(r"(\\?[^\s\[\]{},]+) ?\[(\d+)(?::(\d+))?\]")
_PARTIAL = re.compile(
    rf"^  assign (\{{? ?{_TEMPORARY} \[[^=]*?\]  ?\}}?|{_TEMPORARY} \[[\d:]+\]) = (.*);\n", re.M
)
_VECTOR = re.compile(r"^  (?:input |output )?(?:wire |reg )?\[(\d+):0\] (\\?\S+) *(?:;|=)", re.M)
_PROCESS = re.compile(
    rf"^  always @\* begin\n    if \(\\\$auto\S+ \) begin end\n((    {_TEMPORARY} ) = .*;\n(?:    .*\n)*)  end\n",
    re.M,
)
_REGISTER = re.compile(rf"^  always @\(posedge clk\)\n    (\\?\S+) *<= ({_TEMPORARY}) ;\n", re.M)
_ASSIGNED = r"(?: +[^ \n].* <= .*;\n)+"
_CLOCKED = re.compile(
    rf"^  always @\(posedge clk\) begin\n(?:    if \(rst\) begin\n({_ASSIGNED})    end else begin\n)?"
    rf"( +)if \((.*)\) begin\n({_ASSIGNED})\2end\n(?:    end\n)?  end\n",
    re.M,
)
_OPERAND = r"(?:\$signed\()?(?:\\?[^\s(){}+*&|-]+ ?(?:\[\d+(?::\d+)?\])?|\{ [^{}]* \})\)?"
_MODULAR = re.compile(rf"{_OPERAND} +([+*&|-]) +{_OPERAND} ?|\({_OPERAND} +& +\S+\) << \d+")
_PLACE = re.compile(rf"(\\?[^\s\[\]{{}}]+) +>> +({_TEMPORARY}) ")
_PLACE_OF = re.compile(r"(\S+?) ?(?:\[(\d+):(\d+)\])? +\* \d+'h([0-9a-f]+)")


def for_simulation(text: str) -> str:
    """All modules of `text`, rewritten; what no rule matches stays as it is."""
    modules = re.split(r"^(?=module )", text, flags=re.M)
    for rewrite in (
        join_masked,
        shift_masked,
        merge_equal,
        narrow_sums,
        index_words,
        replicate_runs,
        clock_next_states,
        sink_values,
    ):
        modules = [rewrite(module) for module in modules]
    return "".join(modules)


def join_masked(module: str) -> str:
    """`a & mask` where the converter assigns the bits of `a` and the zeros apart."""
    widths = {wire[3]: int(wire[2] or 0) + 1 for wire in _WIRE.finditer(module)}
    widths |= {name: int(top) + 1 for top, name in _VECTOR.findall(module)}
    parts: dict[str, list[tuple[int, int, str]]] = {}
    for left, right in _PARTIAL.findall(module):
        targets, names = _SLICE.findall(left), {name for name, _, _ in _SLICE.findall(left)}
        if len(names) == 1:
            parts.setdefault(names.pop(), []).extend(_sources(targets, right))
    joined: dict[str, str] = {}
    for name, pieces in parts.items():
        sources = {source for _, _, source in pieces if source}
        covered = sum(high - low + 1 for high, low, _ in pieces)
        if len(sources) != 1 or "?" in sources or not covered == widths.get(name) == widths.get(min(sources)):
            continue
        mask = sum((1 << high + 1) - (1 << low) for high, low, source in pieces if source)
        joined[name] = f"  assign {name}  = {sources.pop()}  & {_hex(mask)};\n"

    def whole(partial: re.Match[str]) -> str:
        name = _SLICE.findall(partial[1])[0][0]
        return joined.pop(name, "") if name in written else partial[0]

    written = set(joined)
    return _PARTIAL.sub(whole, module)


def _sources(targets: list[tuple[str, str, str]], right: str) -> list[tuple[int, int, str]]:
    """(high, low, name of the value whose same bits go there, "" for zeros, "?" for anything else) of an assignment."""
    ranges = [(int(high), int(low or high)) for _, high, low in targets]
    if re.fullmatch(r"\d+'h0+", right):
        return [(high, low, "") for high, low in ranges]
    items = [_SLICE.fullmatch(item) for item in re.split(r" ?, ", right.strip("{ }"))]
    if len(items) != len(ranges):
        return [(high, low, "?") for high, low in ranges]
    return [
        (high, low, item[1] if item and (int(item[2]), int(item[3] or item[2])) == (high, low) else "?")
        for (high, low), item in zip(ranges, items, strict=True)
    ]


def shift_masked(module: str) -> str:
    """`(a & mask) << n` for a concatenation of zeros and of bits of `a` that all move by `n` places, three slices or
    more; where they move down, `(a >> n) & mask`."""
    widths = {wire[3]: int(wire[2] or 0) + 1 for wire in _WIRE.finditer(module)}

    def shifted(assign: re.Match[str]) -> str:
        if not assign[2].startswith("{ ") or "{" in assign[2][2:]:
            return assign[0]
        at, mask, sources, places = 0, 0, set(), set()
        items = re.split(r" ?, ", assign[2][2:-2])
        for item in reversed(items):
            zeros, bits = re.fullmatch(r"(\d+)'h0+", item), _SLICE.fullmatch(item)
            if zeros:
                at += int(zeros[1])
                continue
            if not bits:
                return assign[0]
            high, low = int(bits[2]), int(bits[3] or bits[2])
            mask |= (1 << high + 1) - (1 << low)
            sources.add(bits[1])
            places.add(at - low)
            at += high - low + 1
        if len(items) < 5 or len(sources) != 1 or len(places) != 1 or widths.get(assign[1]) != at:
            return assign[0]
        source, up = sources.pop(), places.pop()
        if up <= 0:
            down = f"({source}  >> {-up})" if up else f"{source} "
            return f"  assign {assign[1]}  = {down} & {_hex(mask >> -up)};\n"
        return f"  assign {assign[1]}  = ({source}  & {_hex(mask)}) << {up};\n"

    return _ASSIGN.sub(shifted, module)


def _hex(mask: int) -> str:
    return f"{mask.bit_length()}'h{mask:x}"


def merge_equal(module: str) -> str:
    """One assignment for intermediate values of equal width and expression."""
    while True:
        kinds = {wire[3]: wire[1] for wire in _WIRE.finditer(module)}
        first: dict[tuple[str, str], str] = {}
        same: dict[str, str] = {}
        for name, expression in _ASSIGN.findall(module):
            if name in kinds:
                kept = first.setdefault((kinds[name], expression), name)
                if kept != name:
                    same[name] = kept
        if not same:
            return module
        module = _merged(module, same)


def _merged(module: str, same: dict[str, str]) -> str:
    """`module` without the values that are keys of `same`, which says what to read instead."""
    module = _ASSIGN.sub(lambda m: "" if m[1] in same else m[0], module)
    module = _WIRE.sub(lambda m: "" if m[3] in same else m[0], module)
    return re.sub(rf"({_TEMPORARY}) ", lambda m: f"{same.get(m[1], m[1])} ", module)


def narrow_sums(module: str) -> str:
    """Sums, products and masks as wide as the low bits of them that anything reads."""
    sums = {name: text for name, text in _ASSIGN.findall(module) if _MODULAR.fullmatch(text)}
    widths = {wire[3]: int(wire[2] or 0) + 1 for wire in _WIRE.finditer(module) if wire[3] in sums}
    uses: dict[str, list[tuple[int, str]]] = {name: [] for name in widths}
    for line in module.splitlines():
        target = re.match(rf"  assign ({_TEMPORARY}) ", line)
        into = (
            target[1] if target and target[1] in widths and "{" not in line else ""
        )  # a concatenation moves bits
        if line.startswith("  wire "):
            continue
        for name, top in re.findall(
            rf"({_TEMPORARY}) (?:\[(\d+)(?::\d+)?\])?", line[target.end() if target else 0 :]
        ):
            if name in uses:
                uses[name].append((int(top) + 1 if top else 0, into))
    changed = True
    while changed:
        changed = False
        for name, width in widths.items():
            needed = max((top or widths.get(into, width) for top, into in uses[name]), default=width)
            if needed < width:
                widths[name], changed = needed, True

    def declared(wire: re.Match[str]) -> str:
        if wire[3] not in widths:
            return wire[0]
        sign = "signed " if "signed" in wire[1] else ""
        return f"  wire {sign}[{widths[wire[3]] - 1}:0] {wire[3]} ;\n"

    return _WIRE.sub(declared, module)


def index_words(module: str) -> str:
    """A slice instead of a shift, where a place is a multiple that lies inside the word or wholly beyond it."""
    values = dict(_ASSIGN.findall(module))
    widths = {name: int(top) + 1 for top, name in _VECTOR.findall(module)}
    wires = {wire[3]: int(wire[2] or 0) + 1 for wire in _WIRE.finditer(module)}

    def indexed(assign: re.Match[str]) -> str:
        shift = _PLACE.fullmatch(assign[2])
        place = _PLACE_OF.fullmatch(values.get(shift[2], "").strip()) if shift else None
        if not shift or not place or assign[1] not in wires:
            return assign[0]
        bits = int(place[2]) - int(place[3]) + 1 if place[2] else widths.get(place[1], wires.get(place[1], 1))
        unit, width, word = int(place[4], 16), wires[assign[1]], widths.get(shift[1], 0)
        part = f"{shift[1]} [{shift[2]} +: {width}]"
        if ((1 << bits) - 1) * unit + width > word:
            if width > unit or word % unit:  # some place would be half inside
                return assign[0]
            part = f"{shift[2]} < {word} ? {part} : {width}'h0"
        return f"  assign {assign[1]}  = {part};\n"

    return _ASSIGN.sub(indexed, module)


def replicate_runs(module: str) -> str:
    """`{4{x}}` for `x, x, x, x` in a concatenation."""

    def shorter(concatenation: re.Match[str]) -> str:
        items = [
            f"{item} " if item.startswith("\\") else item
            for item in re.split(r" ?, ", concatenation[1].strip())
        ]
        found: list[tuple[str, int]] = []
        for item in items:
            count = found.pop()[1] if found and found[-1][0] == item else 0
            found.append((item, count + 1))
        return "{ " + ", ".join(f"{{ {n}{{ {i} }} }}" if n > 1 else i for i, n in found) + " }"

    return re.sub(r"\{ ([^{}]*,[^{}]*) \}", shorter, module)


def clock_next_states(module: str) -> str:
    """Registers that keep their value by not being assigned, and that look at their reset first."""
    uses = Counter(re.findall(rf"{_TEMPORARY} ", module))
    states = {process[2].strip(): process for process in _PROCESS.finditer(module)}
    clocked: dict[str, str] = {}
    for register, name in _REGISTER.findall(module):
        process = states.get(name)
        if process is None:
            continue
        body, inside = process[1], process[1].count(f"{name} ")
        targets = len(re.findall(rf"^ +{re.escape(name)} (?:\[[\d:]+\] ?)? *= ", body, re.M))
        if inside == targets and uses[f"{name} "] == targets + 2:  # and its declaration and its register
            clocked[name] = _clocked(body, name, register)
    module = _PROCESS.sub(lambda m: "" if m[2].strip() in clocked else m[0], module)
    module = _REGISTER.sub(lambda m: clocked.get(m[2], m[0]), module)
    return re.sub(
        rf"^  reg (?:signed )?(?:\[\d+:0\] )?({_TEMPORARY}) ;\n",
        lambda m: "" if m[1] in clocked else m[0],
        module,
        flags=re.M,
    )


def _clocked(body: str, name: str, register: str) -> str:
    """The process of next state `name` as one that assigns `register`."""
    target = re.compile(rf"^( +){re.escape(name)} (\[[\d:]+\])? *= ", re.M)
    keeps = re.match(rf"    {re.escape(name)}  = {re.escape(register)} ?;\n", body)
    body = target.sub(lambda m: f"{m[1]}{register} {m[2] or ''} <= ", body[keeps.end() if keeps else 0 :])
    reset = re.search(r"^    if \(rst\) begin\n(?:      .*\n)    end\n\Z", body, re.M)
    if reset and reset.start():
        rest = re.sub(r"^", "  ", body[: reset.start()].rstrip("\n"), flags=re.M)
        body = f"{reset[0][:-1]} else begin\n{rest}\n    end\n"
    return f"  always @(posedge clk) begin\n{body}  end\n"


def sink_values(module: str) -> str:
    """Values that registers of one condition alone read, computed under it: elsewhere they are in every cycle.

    A simulator does so by itself with a value that is read once.
    """
    blocks, values = list(_CLOCKED.finditer(module)), dict(_ASSIGN.findall(module))
    under = _conditions(module, blocks, values)
    count = Counter(re.findall(rf"({_TEMPORARY}) ", module))
    # Blocks that become one, and their values, readers first.
    parts: list[tuple[frozenset[int], list[str]]] = []
    for name, numbers in under.items():
        joined = [part for part in parts if part[0] & numbers]
        names = [other for _, others in joined for other in others]
        parts = [part for part in parts if not part[0] & numbers]
        parts.append((numbers.union(*(part[0] for part in joined)), [*names, name]))
    # A value stands in its declaration and its assignment, and where it is read.
    parts = [(numbers, names) for numbers, names in parts if any(count[n] > 3 for n in names)]
    texts: dict[int, str] = {}
    for numbers, names in parts:
        chosen = [blocks[n] for n in sorted(numbers)]
        names.sort(key=list(under).index, reverse=True)
        texts |= dict.fromkeys((block.start() for block in chosen), "")
        texts[chosen[0].start()] = _joined(chosen, [f"{name}  = {values[name]};\n" for name in names])
    moved = {name for _, names in parts for name in names}
    module = _CLOCKED.sub(lambda m: texts.get(m.start(), m[0]), module)
    module = _ASSIGN.sub(lambda m: "" if m[1] in moved else m[0], module)
    return _WIRE.sub(lambda m: m[0].replace("wire", "reg", 1) if m[3] in moved else m[0], module)


def _conditions(
    module: str, blocks: list[re.Match[str]], values: dict[str, str]
) -> dict[str, frozenset[int]]:
    """Numbers of the blocks that read a value, itself or through others, where nothing else does and they have one
    condition; readers before what they read."""
    rest = _CLOCKED.sub("", _ASSIGN.sub("", _WIRE.sub("", module)))
    texts: list[tuple[str | int, str]] = [(-1, rest), *((-1, block[3]) for block in blocks)]
    texts += [*values.items(), *((number, block[4]) for number, block in enumerate(blocks))]
    readers: dict[str, set[str | int]] = {name: set() for name in values}
    for reader, text in texts:
        for name in re.findall(rf"({_TEMPORARY}) ", text):
            readers.get(name, set()).add(reader)
    under: dict[str, frozenset[int]] = {}
    for name in TopologicalSorter(
        {name: [r for r in found if isinstance(r, str)] for name, found in readers.items()}
    ).static_order():
        numbers = frozenset[int]().union(
            *(under.get(r, {-1}) if isinstance(r, str) else {r} for r in readers[name])
        )
        if numbers and -1 not in numbers and len({(blocks[n][3], not blocks[n][1]) for n in numbers}) == 1:
            under[name] = numbers
    return under


def _joined(blocks: list[re.Match[str]], values: list[str]) -> str:
    """One block of several with one condition, the values that they read in front."""
    indent, condition = blocks[0][2], blocks[0][3]
    lines = [f"{indent}if ({condition}) begin\n", *(f"{indent}  {value}" for value in values)]
    lines += [*(block[4] for block in blocks), f"{indent}end\n"]
    if blocks[0][1]:
        resets = "".join(block[1] for block in blocks)
        lines = [f"    if (rst) begin\n{resets}    end else begin\n", *lines, "    end\n"]
    return f"  always @(posedge clk) begin\n{''.join(lines)}  end\n"


def register_inputs(design: Design, text: str, names: Collection[str]) -> str:
    """`text` under a top of the same name and ports whose inputs `names` pass a register each, `rst` one of the
    falling edge.

    A harness sets such an input one cycle ahead, before the rising edge that begins its cycle. Nothing between an
    input and the registers is then evaluated outside the clock's edges, which otherwise happens twice a cycle.
    """
    inside = f"{design.top}_inside"
    registers, pins, ports = (
        ["  reg rst_late = 0;", "  always @(negedge clk) rst_late <= rst;"],
        [".clk(clk)"],
        [],
    )
    for name, (direction, width, _) in sorted(design.ports.items()):
        ports.append(f"{'input' if direction == 'i' else 'output'} [{width - 1}:0] {name}")
        pins.append(f".{name}({name}_late)" if name in names else f".{name}({name})")
        if name in names:
            registers += [
                f"  reg [{width - 1}:0] {name}_late = 0;",
                f"  always @(posedge clk) {name}_late <= {name};",
            ]
    header = ",\n  ".join(["input clk", "input rst", *ports])
    body = "\n".join(registers)
    instance = ",\n    ".join([*pins, ".rst(rst_late)"])
    inner = re.sub(rf"^module {design.top}\(", f"module {inside}(", text, count=1, flags=re.M)
    return f"{inner}\nmodule {design.top}(\n  {header}\n);\n{body}\n  {inside} dut (\n    {instance}\n  );\nendmodule\n"
