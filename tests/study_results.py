"""Hand-made results of runs, as scripts/reproduce.py would write them."""

from analysis.results import Epoch, RunResult, encode_bits, epochs_to

NUM_RECORDS = 100


def make_epoch(number, stage, acc):
    return Epoch(
        epoch=number, stage=stage, step=16 * (number + 1), train_loss=1.0, loss=1.0, acc=acc,
        acc_low=acc, acc_high=acc, mean_tokens=2.0, mean_thoughts=float(stage), seconds=1.0,
    )  # fmt: skip


def make_run(arm="m1", seed=0, acc=0.9, **changes):
    accuracies = [0.5, 0.96, 0.3, acc]
    epochs = [make_epoch(4 + i, 1 + i // 2, a) for i, a in enumerate(accuracies)]
    reached = epochs_to(0.95, epochs)
    values = {
        "study": "lags", "condition": "lag2", "block": 0, "is_prerequisite": False, "arm": arm,
        "seed": seed, "commit": "a" * 40, "changed": False, "machine": "EPYC, 2 cores",
        "versions": {"torch": "2.13.0"}, "finished": "2026-11-25T00:00:00Z", "seconds": 60.0,
        "config": {"name": arm}, "data": {"val_path": {"sha256": "0", "bytes": 1}},
        "epochs": epochs, "steps": [], "num_records": NUM_RECORDS,
        "correct": encode_bits([i < 100 * acc for i in range(NUM_RECORDS)]),
        "outcomes": {
            "last_stage_accuracy": acc, "accuracy_zeroed_thoughts": 0.2,
            "epochs_to_threshold": {str(s): n for s, n in reached.items()},
        },
    }  # fmt: skip
    return RunResult(**values | changes)
