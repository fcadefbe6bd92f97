"""The README holds: its example runs, its tables are complete, continuous integration calls its commands."""

from __future__ import annotations

import re

import pytest

from jaxunlearn.methods import METHODS


@pytest.fixture(scope="module")
def readme(repository) -> str:
    return (repository / "README.md").read_text()


def test_the_library_example_runs(readme):
    example = re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)
    assert len(example.strip().splitlines()) <= 15
    names: dict = {}
    exec(example, names)
    assert int(names["state"].step) == 1
    assert float(names["metrics"]["finite"]) == 1


def test_the_method_table_is_the_registry(readme):
    rows = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", readme, re.MULTILINE))
    words = {-1: "ascended", 0: "none", 1: "descended"}
    assert rows == {name: words[method.forget_sign] for name, method in METHODS.items()}
    for name, method in METHODS.items():
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{name}` |"))
        options = ", ".join(f"{key}={value:g}" for key, value in method.combiner_options.items())
        assert f"`{method.combiner}(" in row
        assert method.passes in row
        assert options.split("=")[-1] in row


def test_the_configurations_are_all_named(readme, repository):
    shipped = {path.name for path in (repository / "train" / "configs").glob("*.py")} - {"__init__.py", "defaults.py"}
    assert {name for name in shipped if f"train/configs/{name}" not in readme} == set()


def test_continuous_integration_calls_the_readme_test_command(readme, repository):
    command = re.search(r"pip install -e '\.\[test\]' && (.*)", readme).group(1)
    check = (repository / "scripts" / "check").read_text()
    assert "pip install -q -e '.[test]'\n" + command + "\n" in check
