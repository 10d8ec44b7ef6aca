"""The shape of the code as tables and rules: the order of the rooms, what the core may touch, where gRPC may be.

A *room* is a sub-package of ``ps``, ``worker`` or ``common``, or a file at the top of one. Each rule is a function from
the text of a file to what is wrong with it, so that a planted violation can show that the rule is able to fail.
"""

import ast
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "common": {"common"},
    "ps": {"common", "ps"},
    "worker": {"common", "worker"},
    "compare": {"common", "compare"},
}
#: From top to bottom. A room imports rooms of the lines below its own; two rooms of one line do not know each other.
ORDER = {
    "ps": (
        {"server"},
        {"failover"},
        {"checkpoint", "cluster"},
        {"job"},
        {"engine"},
        {"transport"},
        {"observability"},
        {"core"},
    ),
    "worker": (
        {"commands"},
        {"training"},
        {"client", "data"},
        {"leased_data"},
        {"optim"},
        {"session"},
        {"transport"},
        {"gradients", "runtime", "tasks"},
    ),
    "common": (
        {"options", "rpc"},
        {"arena", "codecs", "security"},
        {"plan", "trace"},
        {"schema"},
        {"daemon_thread", "devices", "optimizer_spec", "version", "wire"},
        {
            "allocator",
            "end_patience",
            "ending_signals",
            "errors",
            "host_id",
            "log",
            "lowest",
            "memory_limit",
            "parent_death",
            "private_pages",
            "pb",
            "slow_start",
            "standard_streams",
            "tensor_words",
            "typed_numbers",
        },
    ),
}
#: Rooms that may speak gRPC.
GRPC_ROOMS = {
    "common": {"rpc"},
    "ps": {"cluster", "server", "transport"},
    "worker": {"transport"},
    "compare": set[str](),
}
#: Files that may lie at the top of a folder: what users import, and in ``common`` and ``compare`` single ideas.
PUBLIC = {"ps": {"__init__"}, "worker": {"__init__", "client", "data", "leased_data"}}
#: Two files may have one name where they do the same, at both ends or for two programs.
SAME_AT_BOTH = {"__init__", "cli", "registry", "responses", "shared_memory", "status"}
#: Kinds of tests that are of the whole system, or of what is no room.
WHOLE_SYSTEM = {
    "bench",
    "chaos",
    "compare",
    "conformance",
    "deploy",
    "docs",
    "fuzz",
    "hostile",
    "integrations",
    "loops",
    "sim",
    "soak",
    "support",
}
#: All that the core may import; what is not here could be a clock, a socket, a thread or a tensor.
PURE = (
    "__future__",
    "abc",
    "bisect",
    "collections",
    "dataclasses",
    "enum",
    "functools",
    "heapq",
    "itertools",
    "math",
    "operator",
    "re",
    "typing",
    "torch_ps.common.errors",
    "torch_ps.common.lowest",
    "torch_ps.common.options.mode_choices",
    "torch_ps.common.wire.terms",
    "torch_ps.ps.core",
)
#: Methods that make a message of bytes.
PARSING = {"FromString", "ParseFromString", "MergeFromString"}
#: Files of a server that read the bytes of peers: the boundary, and a standby what its primary sends.
READERS = ("ps/transport/boundary.py", "ps/failover/standby.py")
PICKLES = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def sources(*folders: str) -> list[Path]:
    """Every Python file of these folders that people write."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in found if not {"pb", "data"} & set(path.relative_to(ROOT).parts)]


def dotted(path: Path) -> str:
    return ".".join(("torch_ps", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def imports(source: str) -> set[str]:
    """Dotted names that a file imports, wherever in it: ``from a import b`` counts as ``a.b``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
    return names


def within(name: str, packages: tuple[str, ...] | set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


# ------------------------------------------------------------------ rules


def wrong_folder(folder: str, source: str) -> set[str]:
    """Imports of a folder that ``folder`` may not see, of the public API, or by a folder's bare name."""
    own = {name for name in imports(source) if within(name, {"torch_ps", *MAY_IMPORT}) or name.startswith(".")}
    return {name for name in own if not within(name, {f"torch_ps.{each}" for each in MAY_IMPORT[folder]})}


def not_below(module: str, source: str) -> set[str]:
    """Imports of ``module`` from rooms of its own folder that are not below its own."""
    _, folder, *rest = module.split(".")
    if folder not in ORDER or not rest:
        return set()
    level = {room: number for number, rooms in enumerate(ORDER[folder]) for room in rooms}
    found = set()
    for name in imports(source):
        _, *parts = name.split(".")
        if (
            parts[:1] == [folder]
            and len(parts) > 1
            and parts[1] != rest[0]
            and level.get(parts[1], -1) <= level[rest[0]]
        ):
            found.add(name)
    return found


def circles(graph: Mapping[str, set[str]]) -> set[str]:
    """Modules that import each other, directly or through others, as ``a > b > a``; one for each circle that is met."""
    found: set[str] = set()
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            found.add(" > ".join((*path[path.index(module) :], module)))
        elif module not in done:
            for each in sorted(graph.get(module, ())):
                visit(each, (*path, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())
    return found


def impure(source: str) -> set[str]:
    calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}
    return {name for name in imports(source) if not within(name, PURE)} | calls & {
        "open",
        "print",
        "input",
        "__import__",
    }


def grpc_imports(source: str) -> set[str]:
    return {name for name in imports(source) if within(name, {"grpc", "grpc_health"})}


def unsafe(source: str) -> set[str]:
    """Ways to run what came in as data."""
    found = {name for name in imports(source) if within(name, PICKLES) or name in ("torch.load", "torch.package")}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id in ("eval", "exec", "compile", "__import__"):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.serialization.load"):
            found.add(ast.unparse(node))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.add("allow_pickle")
    return found


def parsed(source: str) -> set[str]:
    """Ways to read the bytes of a peer."""
    calls = {node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)}
    found = {ast.unparse(f) for f in calls if isinstance(f, ast.Attribute) and f.attr in PARSING}
    readers = {"torch_ps.common.wire.frames.unpack", "torch_ps.common.wire.frames.unpack_all"}
    return found | (imports(source) & readers)


def borrowed(source: str) -> set[str]:
    """Attributes that a class declares and never sets: those of another class, of which it is a torn-off part."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef) or node.decorator_list:  # a dataclass sets what it declares
            continue
        if any(ast.unparse(base).split("[")[0].rpartition(".")[2] in SHAPES for base in node.bases):
            continue
        declared = {
            each.target.id
            for each in node.body
            if isinstance(each, ast.AnnAssign) and each.value is None and isinstance(each.target, ast.Name)
        }
        assigned = {
            each.attr
            for each in ast.walk(node)
            if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store) and ast.unparse(each.value) == "self"
        }
        found |= {f"{node.name}.{name}" for name in declared - assigned}
    return found


#: Bases of classes whose annotations are their meaning.
SHAPES = {"Protocol", "NamedTuple", "TypedDict", "Structure"}


def broken(rule: Callable[[str], set[str]], paths: list[Path]) -> str:
    """One line for each file that breaks a rule."""
    found = {path.relative_to(ROOT): sorted(rule(path.read_text(encoding="utf-8"))) for path in paths}
    return "\n".join(f"{path}: {', '.join(wrong)}" for path, wrong in found.items() if wrong)
