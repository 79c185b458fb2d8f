"""The lab: runs experiments over seeds, keeps the ledger of measurements, gives verdicts, publishes, reports."""

from broadsheet._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "context": ["Context", "Plate"],
        "ledger": ["Ledger", "Measurement"],
        "results": ["Published", "publish", "published"],
        "runner": ["Outcome", "run", "run_papers"],
        "verdicts": ["Finding", "Verdict", "finding"],
    },
    submodules=["context", "ledger", "machine", "memory", "report", "results", "runner", "testing", "verdicts"],
)
