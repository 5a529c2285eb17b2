"""What tells a mistake of the user's and damaged data from a fault of ours."""


class UserError(ValueError):
    """A mistake of the user's: shown as one line without a traceback; the process exits with code 2."""


class SharedError(UserError):
    """One that is raised on all ranks alike, so that only rank 0 needs to show it."""


class BadData(Exception):
    """A shard or sample that is not what it should be: fails the run or is skipped, as data.on_bad_sample says."""


class RunFailed(Exception):
    """A run that cannot go on, through nothing that a config could mend: one line, exit code 1."""
