"""Problems in a source. Apart from `common` so that worker processes need not import TFDS."""

import dataclasses

from rg_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something in the source that is not as it should be.

    `kind`: a few words under which it is counted. `file`: where, relative to the source. `detail`:
    what is wrong and what to do. `harmful`: would harm training, so the record cannot be used;
    otherwise it was repaired or left out without loss.
    """

    kind: str
    file: str
    detail: str
    harmful: bool = True

    def __str__(self) -> str:
        return f"{self.file}: {self.detail}"


class Found(UserError):
    """A harmful problem met deep inside a reader; whoever asked for the record reports it."""

    def __init__(self, kind: str, file: object, detail: str):
        self.problem = Problem(kind, str(file), detail)
        super().__init__(str(self.problem))

    def __reduce__(self):  # an exception is rebuilt from its text otherwise
        return Found, (self.problem.kind, self.problem.file, self.problem.detail)
