"""`python -m wan_sweep`."""

from wan_sweep.cli import main

if __name__ == "__main__":
    main()
