"""Print the lowest version that pyproject.toml allows of each package of the tests, as pip's constraints."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def lowest(requirements):
    """Yield NAME==VERSION for each lower bound; an extra of the project itself stands for its list."""
    for requirement in map(Requirement, requirements):
        if requirement.name == project["name"]:
            for extra in requirement.extras:
                yield from lowest(project["optional-dependencies"][extra])
        for bound in requirement.specifier:
            if bound.operator == ">=":
                yield f"{requirement.name}=={bound.version}"


print(*lowest([*project["dependencies"], f"{project['name']}[test]"]), sep="\n")
