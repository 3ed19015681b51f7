"""No rule without a check: the wheel is whole, every module has its tests, and the reference names everything."""

import re
import zipfile
from configparser import ConfigParser
from itertools import chain
from pathlib import Path
from types import UnionType
from typing import Any, Final, Literal, get_args, get_origin

import pytest
import typer
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from prometheus_client.metrics import MetricWrapperBase
from pydantic import AliasChoices, SecretStr
from pydantic.fields import FieldInfo

import goodstanding
from goodstanding import create_app, errors, metrics
from goodstanding.cli import app as command_line
from goodstanding.errors import GoodstandingError
from goodstanding.settings import PREFIX, Settings, load_settings
from tests.serving import root

_PACKAGE: Final = root() / "src" / "goodstanding"
_REFERENCE: Final = root() / "docs" / "reference"
_MODULES: Final = sorted(path.stem for path in _PACKAGE.glob("*.py"))
_METRICS: Final = [value for value in vars(metrics).values() if isinstance(value, MetricWrapperBase)]
_TESTS: Final = {"__init__": "public_api"}


def _reference(page: str) -> str:
    return (_REFERENCE / f"{page}.md").read_text("utf-8")


def _rows(page: str) -> dict[str, list[str]]:
    """Give the tables of a page by what stands first in each row, without the back quotes around it."""
    rows = {}
    for line in _reference(page).splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            rows[cells[0].split("`")[1]] = cells
    return rows


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """Build the wheel, without network and isolation."""
    folder = tmp_path_factory.mktemp("wheel")
    [built] = WheelBuilder(str(root())).build(directory=str(folder), versions=["standard"])
    return zipfile.Path(built)


class TestDistribution:
    """What is built and published."""

    def test_the_wheel_holds_every_file_of_the_package(self, wheel: zipfile.Path) -> None:
        """SQL, Lua, HTML, the type marker and every module are inside."""
        inside = set(wheel.root.namelist())
        wanted = {
            f"goodstanding/{path.relative_to(_PACKAGE).as_posix()}"
            for path in _PACKAGE.rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }
        assert {".sql", ".lua", ".html", ".py", ".typed"} == {
            Path(name).suffix or Path(name).name.replace("py.typed", ".typed") for name in wanted
        }
        assert set() == wanted - inside

    def test_the_wheel_holds_nothing_else(self, wheel: zipfile.Path) -> None:
        """No test, no cache and no data of a developer is inside."""
        folders = {name.split("/")[0] for name in wheel.root.namelist()}
        assert {"goodstanding", f"goodstanding-{goodstanding.__version__}.dist-info"} == folders

    def test_the_wheel_brings_the_command_and_the_licence(self, wheel: zipfile.Path) -> None:
        """The wheel installs `goodstanding`, and carries the text of its licence."""
        info = wheel / f"goodstanding-{goodstanding.__version__}.dist-info"
        parser = ConfigParser()
        parser.read_string((info / "entry_points.txt").read_text("utf-8"))
        assert {"goodstanding": "goodstanding.cli:app"} == dict(parser["console_scripts"])
        assert "Apache License" in (info / "licenses" / "LICENSE").read_text("utf-8")

    def test_the_source_distribution_can_be_built(self, tmp_path: Path) -> None:
        """The source distribution builds from the tree as it is."""
        [built] = SdistBuilder(str(root())).build(directory=str(tmp_path), versions=["standard"])
        assert Path(built).stat().st_size > 10_000


@pytest.mark.parametrize("module", _MODULES)
def test_every_module_has_its_tests(module: str) -> None:
    """Each module has a file of tests with its name, and a docstring that says what it is."""
    assert (root() / "tests" / f"test_{_TESTS.get(module, module)}.py").is_file()
    assert (_PACKAGE / f"{module}.py").read_text("utf-8").startswith('"""')


class TestReference:
    """The reference names what there is, and nothing that there is not."""

    def test_settings(self) -> None:
        """Every setting has its row, with every name that it is read from, and no row is of something else."""
        expected = {_names(field, name)[0]: _names(field, name) for name, field in Settings.model_fields.items()}
        rows = _rows("settings")
        assert expected.keys() == rows.keys()
        for name, names in expected.items():
            assert names == re.findall(r"`(\w+)`", rows[name][0])

    @pytest.mark.parametrize("name", Settings.model_fields)
    def test_a_setting(self, name: str) -> None:
        """A setting's row has its default, its description, its bounds and its choices."""
        field = Settings.model_fields[name]
        _, default, meaning = _rows("settings")[_names(field, name)[0]]
        assert _default(field) == default.strip("`")
        assert field.description is not None
        assert meaning.startswith(field.description.replace("|", r"\|"))
        for bound in field.metadata:
            for limit in ("ge", "le"):
                if hasattr(bound, limit):
                    assert str(getattr(bound, limit)) in meaning.replace(",", "")
        for choice in _choices(field.annotation):
            assert f"`{choice}`" in meaning

    def test_metrics(self) -> None:
        """Every metric has its row with its kind and its labels, and no row is of something else."""
        rows = _rows("metrics")
        ours = {_name(metric): metric for metric in _METRICS}
        assert ours.keys() == {name for name in rows if name.startswith("goodstanding_")}
        for name, metric in ours.items():
            assert type(metric).__name__.lower() == rows[name][1]
            assert list(metric._labelnames) == re.findall(r"`(\w+)`", rows[name][2])  # noqa: SLF001 - told nowhere else

    def test_log_lines(self) -> None:
        """Every event that is logged has its row, and no row is of something else."""
        source = "".join(path.read_text("utf-8") for path in _PACKAGE.glob("*.py"))
        logged = set(re.findall(r'_log\.\w+\(\s*"(\w+)"', source))
        table = _reference("metrics").partition("# Log lines")[2]
        assert logged == set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", table, re.MULTILINE))))

    def test_alerts_are_about_metrics_that_exist(self) -> None:
        """Every metric that an alert asks for is one of ours."""
        asked = set(
            re.findall(r"goodstanding_\w+", (root() / "deploy" / "prometheus" / "alerts.yml").read_text("utf-8"))
        )
        ours = {_name(metric) for metric in _METRICS}
        parts = {f"{name}{part}" for name in ours for part in ("_bucket", "_count", "_sum")}
        assert set() == asked - ours - parts

    def test_commands(self) -> None:
        """Every command has its row with every option of its own, and no row is of something else."""
        rows = {key.split()[1]: cells for key, cells in _rows("cli").items() if key.startswith("goodstanding ")}
        described: Any = typer.main.get_command(command_line)
        assert described.commands.keys() == {name for name in rows if not name.startswith("-")}
        for name, command in described.commands.items():
            told = " ".join(rows[name])
            for parameter in command.params:
                words = [*parameter.opts, *parameter.secondary_opts, str(parameter.name).upper()]
                assert any(word in told for word in words), (name, parameter.name)

    def test_calls(self) -> None:
        """Every call of the contract has its row, and no row is of something else."""
        settings = load_settings(database_url="postgresql://app@localhost/app", jwt_secret="x" * 40)
        served = {
            f"{method.upper()} {path}"
            for path, methods in create_app(settings).openapi()["paths"].items()
            for method in methods
        }
        assert served == {name for name in _rows("http") if re.match(r"[A-Z]+ /", name)}

    def test_error_codes(self) -> None:
        """Every status and code that a caller may see is in the table of errors."""
        page = _reference("http")
        kinds = [
            kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GoodstandingError)
        ]
        for kind in kinds:
            if kind is not errors.ConfigurationError:
                assert re.search(rf"^\| {kind.status} \| .*`{kind.code}`", page, re.MULTILINE), kind

    def test_pages_lead_somewhere(self) -> None:
        """Every relative link in the documentation leads to a file."""
        pages = chain(root().glob("*.md"), (root() / "docs").rglob("*.md"))
        broken = [
            (page.name, target)
            for page in pages
            for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#]+)", page.read_text("utf-8"))
            if not (page.parent / target).exists()
        ]
        assert [] == broken


def _names(field: FieldInfo, name: str) -> list[str]:
    if isinstance(field.validation_alias, AliasChoices):
        return [str(choice) for choice in field.validation_alias.choices]
    return [f"{PREFIX}{name.upper()}"]


def _default(field: FieldInfo) -> str:
    match field.default:
        case bool() as value:
            return str(value).lower()
        case SecretStr() as value:
            return value.get_secret_value()
        case None | ():
            return ""
        case value:
            return str(value)


def _choices(annotation: object) -> list[str]:
    if get_origin(annotation) is Literal:
        return [str(choice) for choice in get_args(annotation)]
    if isinstance(annotation, UnionType):
        return [choice for part in get_args(annotation) for choice in _choices(part)]
    return []


def _name(metric: MetricWrapperBase) -> str:
    [family] = metric.describe()
    return f"{family.name}_total" if family.type == "counter" else family.name
