"""Find the strategies, streams and configurations of installed packages through an entry point.

A package with YAML files in folders that are named as those of `conf/` (`stream/mine.yaml`) has in its
pyproject.toml::

    [project.entry-points."clsim.conf"]
    mypackage = "mypackage.conf"

and `cl-run stream=mine` finds them.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

GROUP = "clsim.conf"


class InstalledPackages(SearchPathPlugin):
    """Adds the configurations of installed packages after those of `cl.conf`, so that they cannot replace them."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append each package that an entry point names to Hydra's search path."""
        for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
            search_path.append(provider=f"clsim plugin {point.name}", path=f"pkg://{point.value}")


def register() -> None:
    """Register `InstalledPackages` with Hydra; a second call changes nothing."""
    if InstalledPackages not in Plugins.instance().discover(SearchPathPlugin):
        Plugins.instance().register(InstalledPackages)
