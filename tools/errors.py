"""The one error of these scripts."""


class PrepareError(Exception):
    """A model or text cannot be made: what happened, and what to do next."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}\n  next: {remedy}")
        self.what = what
        self.remedy = remedy
