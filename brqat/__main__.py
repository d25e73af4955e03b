"""brqat, and python -m brqat: the door to brqat.train.

Hydra answers --help, --cfg and a key that does not exist by itself, and a launcher sends a sweep's runs to other
processes: neither should wait for torch, so brqat.train is imported when a run begins.
"""

from typing import Any

import hydra
from omegaconf import DictConfig

from brqat.files import config_dir


@hydra.main(config_path=config_dir(), config_name="train")
def main(cfg: DictConfig) -> Any:
    """What brqat.train.main returns for a run."""
    from brqat.train import main as train

    return train(cfg)


if __name__ == "__main__":
    main()
