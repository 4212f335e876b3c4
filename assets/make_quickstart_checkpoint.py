"""Copy a finished quickstart's last checkpoint to assets/quickstart-checkpoint, with its card.

    make quickstart
    python assets/make_quickstart_checkpoint.py exps/quickstart/coconut

A clone answers questions with these weights before anything is trained (scripts/ask.py). The card,
README.md, says what they were trained on and how well they do; its figures are those that the run
logged. Needs the standard library alone.
"""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from preprocessing.common import InputError, read_json, report

COMMITTED = Path(__file__).parent / "quickstart-checkpoint"
MAX_BYTES = 3_000_000

CARD = """\
---
license: mit
library_name: transformers
pipeline_tag: text-generation
---

# A tiny model that reasons in latent thoughts

{parameters:,} parameters, trained by `make quickstart` in this repository, so that a clone can ask
a trained model before it trains one:

```bash
python scripts/ask.py "3 + 4 - 2 + 5 ="
```

- **Questions.** Sums on a clock with ten hours: an hour, then three signs and terms, all of them
  digits, and an equals sign, with blanks between: `3 + 4 - 2 + 5 =`. It knows nothing else.
- **Method.** Coconut with a window of {window} states (weights {weights}, nearest first): after
  {stage} stages, {stage} thoughts stand where {stage} steps were written.
- **Accuracy.** {accuracy:.1f} % of {num_records} held-out questions ({num_correct} right; 95 %
  interval {low:.1f} to {high:.1f}). Guessing gives 10 %.
- **Data.** `python preprocessing/arithmetic.py`: {num_train:,} questions to train on
  (sha256 `{train_sha256}`), {num_records} held out (`{val_sha256}`); no question is in both.
- **Training.** `make quickstart` (three epochs of CoT, then six of Coconut, seed {seed}) at commit
  `{commit}`, with {versions} on {machine}.
- **Limits.** One seed of a toy: it shows how the parts work, not how good the method is.
- **Licence.** MIT, as the repository's.

Made by `python assets/make_quickstart_checkpoint.py exps/quickstart/coconut`.
"""


def last_checkpoint(run: Path) -> Path:
    """The checkpoint of a run with the highest number.

    Raises: InputError where it has none.
    """
    found = [path for path in run.glob("checkpoint_*") if (path / "coconut.json").is_file()]
    if not found:
        raise InputError(f"{run}: has no checkpoint; name the Coconut run of a finished quickstart")
    return max(found, key=lambda path: int(path.name.removeprefix("checkpoint_")))


def card(run: Path, checkpoint: Path) -> str:
    """The text of README.md."""
    metadata = read_json(checkpoint / "coconut.json", "name an intact run")
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    evaluations = {
        entry["eval/epoch"]: entry for entry in map(json.loads, lines) if "eval/epoch" in entry
    }
    figures = evaluations[metadata["epoch"]]
    origin = metadata["provenance"]
    data = origin["data"]
    return CARD.format(
        parameters=count_parameters(checkpoint / "model.safetensors"),
        window=metadata["latent_window_size"],
        weights=", ".join(map(str, metadata["latent_weights"])),
        stage=metadata["stage"],
        accuracy=100 * figures["eval/acc"],
        low=100 * figures["eval/acc_low"],
        high=100 * figures["eval/acc_high"],
        num_correct=figures["eval/num_correct"],
        num_records=figures["eval/num_records"],
        num_train=data["train_path"]["records"],
        train_sha256=data["train_path"]["sha256"],
        val_sha256=data["val_path"]["sha256"],
        seed=seed_of(run),
        commit=origin["commit"],
        versions=", ".join(f"{name} {number}" for name, number in origin["versions"].items()),
        machine=origin["machine"],
    )


def seed_of(run: Path) -> str:
    """The seed in a run's config.yaml, which is flat."""
    lines = (run / "config.yaml").read_text(encoding="utf-8").splitlines()
    return next(line.partition(":")[2].strip() for line in lines if line.startswith("seed:"))


def count_parameters(file: Path) -> int:
    """Numbers in a safetensors file, by its header."""
    with open(file, "rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    return sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")


def main(argv: list[str] | None = None) -> int:
    """Write the folder; return 2, after one message, on a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="the Coconut run of a finished quickstart")
    parser.add_argument("--out", type=Path, default=COMMITTED, help=f"folder ({COMMITTED})")
    options = parser.parse_args(argv)
    try:
        checkpoint = last_checkpoint(options.run)
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        if size > MAX_BYTES:
            raise InputError(
                f"{checkpoint}: has {size:,} bytes; the quickstart's fit {MAX_BYTES:,}"
            )
        text = card(options.run, checkpoint)
        shutil.copytree(checkpoint, options.out, dirs_exist_ok=True)
        (options.out / "README.md").write_text(text, encoding="utf-8")
    except InputError as error:
        return report(str(error))
    except OSError as error:
        return report(f"{error.filename}: {error.strerror}; name a finished run, or another --out")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
