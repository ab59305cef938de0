"""Prepare text: `python -m openmoe.launcher.prepare data.input=DIR data.output=DIR tokenizer.path=FILE`."""

from openmoe.data.prepare_command import prepare_folder
from openmoe.data.prepare_config import PrepareConfig


def main() -> None:
    # Each worker imports this module too, and needs neither torch nor Hydra.
    from openmoe.launcher.entry import run_command

    run_command(prepare_folder, PrepareConfig, "prepare")


if __name__ == "__main__":
    main()
