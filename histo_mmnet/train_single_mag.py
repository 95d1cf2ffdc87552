"""Train the baseline alone: for every fold a network of each magnification, on the images and with the loop of MMNet.

python histo_mmnet/train_single_mag.py
python histo_mmnet/train_single_mag.py --fold 2 --preset breakhis data.root=data/original_data/BreaKHis_v1

They lie in the run's folder beside MMNet's weights: models/best_model_40X_fold_0.pth and so on.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from common.errors import end_imports_quietly

    end_imports_quietly()

from common.errors import run_script
from histo_mmnet.config import Config
from histo_mmnet.members import Member, baselines_of
from histo_mmnet.splits import Trial
from histo_mmnet.train import train_script


def members_of(trials: list[Trial], config: Config) -> list[Member]:
    """The baselines of each fold."""
    return [member for trial in trials for member in baselines_of(trial.number)]


def main(arguments: list[str]) -> int:
    return train_script(__doc__ or "", members_of, arguments)


if __name__ == "__main__":
    run_script(main)
