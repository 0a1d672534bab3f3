"""The repository itself: who imports whom, what is never written, that every kernel file stands
alone."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
# what each package of ladd/ may import, besides itself; commands at the root of ladd/, train.py and
# sample.py may import anything
MAY_IMPORT = {
    "cli": set(),
    "core": {"cli"},
    "data": {"core", "cli"},
    "toy": {"core", "data", "cli"},
    "sd3": {"core", "data", "cli"},
    "config": {"core", "cli"},
    "engine": {"core", "data", "sd3", "config", "cli"},
    "report": {"core", "data", "toy", "sd3", "config", "engine", "cli"},
}
COMMANDS = {"encode", "export", "dpo", "lcm", "bench", "build"}
TOOLS = {"__init__", "bench", "aot"}             # of kernels; they know the others
# the one kernel file that does not stand alone: it has attention's pre-pass, backward and checks
DEPENDENT = ROOT / "kernels/attention_gluon.py"
LADD = sorted(path for path in ROOT.glob("ladd/**/*.py") if path.stem != "__init__")
KERNELS = sorted(path for path in ROOT.glob("kernels/*.py")
                 if path.stem not in TOOLS and path != DEPENDENT)
SOURCES = [*sorted(ROOT.glob("*.py")), *LADD, *sorted(ROOT.glob("kernels/*.py"))]
TESTS = sorted(ROOT.glob("tests/*.py"))
README, REQUIREMENTS = ROOT / "README.md", (ROOT / "requirements.txt").read_text().splitlines()
needs_readme = pytest.mark.skipif(not README.exists(), reason="README.md is not written yet")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> set[str]:
    """Dotted names of what a file imports, at whatever depth; "from a import b" gives a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


# imports

def package_of(path: Path) -> str:
    return path.relative_to(ROOT / "ladd").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", LADD, ids=name_of)
def test_a_package_imports_only_what_the_table_allows(path):
    package, found = package_of(path), imports(path)
    assert not {name.split(".")[0] for name in found} & {"train", "sample", "tests", "pickle"}
    if package not in MAY_IMPORT:
        assert package in COMMANDS, f"{name_of(path)}: add it to MAY_IMPORT or COMMANDS"
        return
    used = {name.split(".")[1] for name in found if name.startswith("ladd.")}
    bad = used - MAY_IMPORT[package] - {package}
    assert not bad, f"{name_of(path)} imports {sorted(bad)}"
    if package == "cli":
        assert {name.split(".")[0] for name in found} <= set(sys.stdlib_module_names)


def test_no_import_goes_in_a_circle():
    below = {}
    for path in LADD:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        below[name] = {other for other in imports(path)
                       if (ROOT / (other.replace(".", "/") + ".py")).exists()}
    while below:
        free = [name for name, used in below.items() if not used & set(below)]
        assert free, f"a circle among {sorted(below)}"
        for name in free:
            del below[name]


def test_no_function_of_the_packages_takes_the_whole_configuration():
    """Only the scripts and the commands do; everything else gets values, or a group of them."""
    for path in LADD:
        if package_of(path) in COMMANDS | {"config"}:
            continue
        names = {node.id for node in ast.walk(ast.parse(path.read_text()))
                 if isinstance(node, ast.Name)}
        assert "Config" not in names, name_of(path)


@pytest.mark.parametrize("path", KERNELS, ids=name_of)
def test_a_kernel_file_imports_only_the_standard_library_torch_and_triton(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots - set(sys.stdlib_module_names) - {"torch", "triton"}


def test_one_kernel_file_imports_another_one():
    found = imports(DEPENDENT)
    assert {name for name in found if name.startswith("kernels")} == {"kernels",
                                                                      "kernels.attention"}
    roots = {name.split(".")[0] for name in found}
    assert not roots - set(sys.stdlib_module_names) - {"torch", "triton", "kernels"}


def test_kernel_files_import_where_nothing_else_is(tmp_path):
    code = ("import importlib.util, sys\n"
            "for path in sys.argv[1:]:\n"
            "    spec = importlib.util.spec_from_file_location('alone', path)\n"
            "    spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
            "assert 'kernels' not in sys.modules and 'ladd' not in sys.modules\n")
    copies = [tmp_path / path.name for path in KERNELS]
    for path, copy in zip(KERNELS, copies):
        copy.write_text(path.read_text())
    command = [sys.executable, "-I", "-c", code, *map(str, copies)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert len(copies) >= 3 and done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_triton_is_imported_only_under_a_guard(path):
    # a function, an if or a try of the file is a guard
    for node in ast.parse(path.read_text()).body:
        plain = re.match(r"(import|from) triton\b", ast.unparse(node))
        assert not plain, f"{name_of(path)}:{node.lineno} imports triton without a guard"


def test_triton_is_required_on_linux_alone():
    lines = [line for line in REQUIREMENTS if line.startswith("triton")]
    assert len(lines) == 1 and re.search(r"; *(platform_system|sys_platform) == .[Ll]inux.$",
                                         lines[0])


@pytest.mark.parametrize("torch, triton", [("2.11.0", "3.6.0"), ("2.12.1", "3.7.1"), ("2.13.0",
                                                                                      "3.7.1"),
                                           ("2.14.1", "3.8.0"), ("2.15.0", "3.9.0")])
def test_each_torch_is_admitted_with_the_triton_that_it_requires(torch, triton):
    admitted = {line.name: line.specifier for line in map(Requirement, REQUIREMENTS)}
    assert torch in admitted["torch"] and triton in admitted["triton"]


def test_what_is_imported_is_required():
    required = {re.split(r"[^\w-]", line)[0] for line in REQUIREMENTS}
    # DESIGN section 8: imported where used; flash_attn is a contender in the benchmark, if it is
    # there
    optional = {"transformers", "diffusers", "tensorboard", "flash_attn", "flash_attn_interface"}
    known = set(sys.stdlib_module_names) | {"ladd", "kernels"}
    for path in SOURCES:
        roots = {name.split(".")[0] for name in imports(path)} - known
        missing = {{"PIL": "pillow"}.get(root, root) for root in roots} - required - optional
        assert not missing, (
            f"{name_of(path)} imports {sorted(missing)}, which requirements.txt does not list")


# what is never written

@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_broad_except_no_pickle_nothing_left_to_do(path):
    """But one broad except: the libraries raise errors of any type for a published folder."""
    text, bad = path.read_text(), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else ""
            if not caught or re.search(r"\b(Base)?Exception\b", caught):
                bad.append(f"{node.lineno}: except {caught}")
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.load", "torch.save"):
            bad.append(f"{node.lineno}: {ast.unparse(node)}")
    if name_of(path) == "ladd/sd3/encoders.py":
        assert len(bad) == 1 and bad.pop().endswith(": except Exception")
    bad += [name for name in imports(path) if name.split(".")[0] in ("pickle", "dill", "joblib")]
    bad += [line.strip() for line in text.splitlines() if re.search(r"\b(TODO|FIXME|XXX)\b", line)]
    assert not bad, f"{name_of(path)}: {bad}"


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git checkout: which files are tracked is not known")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_tracked_file_names_a_path_of_a_machine():
    home = re.compile(
        rb"(?<![\w.~:/])/(work|home|Users|root|tmp|mnt|scratch|data)/[\w.]|[A-Z]:\\\\?Users")
    found = []
    for path in tracked():
        content = path.read_bytes()
        if b"\0" not in content[:8192]:
            found += [(name_of(path), line[:99]) for line in content.splitlines()
                      if home.search(line)]
    assert not found, found


def test_no_run_and_no_weights_are_tracked():
    heavy = lambda path: (path.suffix in (".safetensors", ".pt", ".ckpt")
                          or path.stat().st_size > 2 ** 20)
    assert not [name_of(path) for path in tracked() if heavy(path)
                or name_of(path).startswith("runs/")]


# width

def test_no_line_is_longer_than_100_columns():
    lines = [(name_of(path), i + 1) for path in [*SOURCES, *TESTS]
             for i, line in enumerate(path.read_text().splitlines()) if len(line) > 100]
    assert not lines, lines


# README

def code_blocks() -> str:
    return "\n".join(re.findall(r"^```\w*\n(.*?)^```", README.read_text(), re.M | re.S)) + "\n" + \
        "\n".join(re.findall(r"^    (\S.*)$", README.read_text(), re.M))


@needs_readme
def test_the_readmes_training_commands_are_understood():
    from ladd.config import parse_config
    commands = [line for line in re.findall(r"python train\.py([^\n#&|]*)", code_blocks()) if "["
                not in line]
    assert commands
    for line in commands:
        parse_config(line.split())


def test_every_documented_command_and_its_flags_exist():
    """In all READMEs and docstrings; train.py and ladd.bench have one flag per option."""
    from ladd.config import FIELDS
    options = {"--" + name.replace("_", "-") for name in FIELDS} | {"--set", "--help", "--help-all"}
    texts = [path.read_text() for path in [*ROOT.rglob("README.md"), *SOURCES, *TESTS]]
    commands = [line for text in texts for line in re.findall(
        r"python (?:-m )?((?:ladd|kernels|tests|train|sample)[\w./]*)((?:\\\n|[^\n#&|`;])*)", text)]
    assert len(commands) > 50
    for name, rest in commands:
        name = name.rstrip(".")
        path = ROOT / (name if name.endswith(".py") else name.replace(".", "/") + ".py")
        assert path.is_file(), name
        source = path.read_text()
        fields = name in ("train.py", "ladd.bench")
        known = options if fields else {"--help", *re.findall(
            r'"(--[a-z][a-z0-9-]*)"', source)}
        if '"--{' in source:                            # a loop over names
            known |= {"--" + word for word in re.findall(r"(\w+)=", source)}
        unknown = set(re.findall(r"(?<=\s)--[a-z][a-z0-9-]*", rest)) - known
        assert not unknown, (name, rest, unknown)
