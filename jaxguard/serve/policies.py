"""Registered policies: the only ones that a request may name."""

from pathlib import Path

from jaxguard.config.base import names
from jaxguard.data.policies import POLICY_FOLDER, Policy, load_policy
from jaxguard.utils.errors import JaxguardError


class Policies:
    """Policies by the names under which a service offers them: the default, and the YAML files of a folder.

    Attributes:
        default: name of the policy of a request that names none.
        current: replaced as a whole, so that a request sees one version.
    """

    def __init__(self, guard_policy: Policy, default: str | None = None, folder: Path | None = None) -> None:
        """Read all; `default` is a name in configs/policies or a path, and None stands for the guard's own.

        JaxguardError: there is no such policy or folder, or a file is malformed.
        """
        self.folder, self._source = folder, default
        self.default = guard_policy.name if default is None else _name(default)
        if folder is not None and not folder.is_dir():
            raise JaxguardError(f"--policies: {folder} is no folder")
        self.current: dict[str, Policy] = {self.default: guard_policy}
        self.current, errors = self.read()
        if errors:
            raise errors[0]

    def read(self) -> tuple[dict[str, Policy], list[JaxguardError]]:
        """Read all files again: the policies, of malformed files those of now, and what is wrong with these."""
        sources = {} if self.folder is None else {name: (name, self.folder) for name in names(self.folder)}
        policies, errors = dict[str, Policy](), list[JaxguardError]()
        if self._source is None:
            policies[self.default] = self.current[self.default]
        else:
            sources[self.default] = (self._source, POLICY_FOLDER)
        for name, source in sources.items():
            try:
                policies[name] = load_policy(*source)
            except JaxguardError as error:
                errors.append(error)
                if name in self.current:
                    policies[name] = self.current[name]
        return policies, errors


def _name(source: str) -> str:
    """What a policy is called that is given by name or path."""
    path = Path(source)
    return path.stem if path.suffix in {".yaml", ".yml"} else source
