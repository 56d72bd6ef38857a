"""An editable install exposes the training program too; a wheel has the library alone."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class TrainInEditable(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            self.build_config.target_config["packages"].append("train")
