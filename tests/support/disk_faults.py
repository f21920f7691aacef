"""Every phase of a save, with every way in which its calls can fail, and what follows."""

from dataclasses import dataclass

from support.failing_disk import Fault

FILES = {
    "tensor file": "*.partial/__0_0.distcp",
    "torch's index": "*.partial/.metadata.tmp",
    "metadata": "*.partial/metadata.json",
    "checksums": "*.partial/SHA256SUMS",
}
TEXTS = {
    "EIO": "Input/output error",
    "ENOSPC": "No space left on device",
    "EROFS": "Read-only file system",
}
ERRORS = tuple(TEXTS)


@dataclass(frozen=True)
class Case:
    """Faults during the save of step 2, after that of step 1."""

    faults: tuple[Fault, ...]
    is_saved: bool = False
    """Whether the save succeeds nevertheless."""
    is_visible: bool = False
    """Whether a failed save's folder has its final name, and is complete."""
    is_damaged: bool = False
    """Whether the save seems to succeed, and its damage is found on resume."""
    leaves: str = ""
    """The name of a folder that is only deleted at the next save."""
    warning: str = ""
    """Part of the error or warning; default: the error's text."""

    @property
    def message(self) -> str:
        return self.warning or TEXTS.get(self.faults[0].outcome, "")


def _cases() -> dict[str, Case]:
    cases = {}
    for name, path in FILES.items():
        for error in ("EIO", "ENOSPC"):
            for operation in ("create", "write", "fsync"):
                fault = Fault(operation, path, error)
                cases[f"{operation} of the {name}: {error}"] = Case((fault,))
        cases[f"write of the {name}: short"] = Case((Fault("write", path, "short"),), is_saved=True)
        for outcome in ("lost", "flip"):
            cases[f"write of the {name}: {outcome}"] = Case(
                (Fault("write", path, outcome),), is_saved=True, is_damaged=True
            )
    for error in ERRORS:
        cases[f"partial folder: {error}"] = Case((Fault("mkdir", "*.partial", error),))
        cases[f"rename of torch's index: {error}"] = Case(
            (Fault("rename", FILES["torch's index"], error),)
        )
        cases[f"fsync of the partial folder: {error}"] = Case((Fault("fsync", "*.partial", error),))
        cases[f"rename: {error}"] = Case((Fault("rename", "*.partial", error),))
        cases[f"fsync of the folder: {error}"] = Case(
            (Fault("fsync", "*/checkpoints", error),), is_visible=True
        )
        cases[f"rename before pruning: {error}"] = Case(
            (Fault("rename", "*/.step-000000001.partial", error),),
            is_saved=True,
            warning="could not delete an older checkpoint",
        )
        cases[f"pruning: {error}"] = Case(
            (Fault("unlink", "*.partial/*", error, at=2),),
            is_saved=True,
            leaves=".step-000000001.partial",
            warning="could not delete an older checkpoint",
        )
        cases[f"everything from the tensor file on: {error}"] = Case(
            tuple(
                Fault(operation, "*/checkpoints*", error, times=0)
                for operation in ("write", "rename", "unlink", "mkdir")
            )[: 4 if error == "EROFS" else 3],
            leaves="" if error == "EROFS" else ".step-000000002.partial",
        )
    return cases


CASES = _cases()
