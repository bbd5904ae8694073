from rollout.cli import run
from rollout.reward.cli import main

if __name__ == "__main__":
    run(main)
