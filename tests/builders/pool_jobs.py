"""A job for worker processes, in a module that is imported quickly."""

import os

from rg_jax.errors import UserError


def double(job):
    """(twice the job, id of the process that did it); 7 raises, "die" ends the process."""
    if job == 7:
        raise UserError("slice 7 is torn")
    if job == "die":
        os._exit(3)
    return 2 * job, os.getpid()
