"""Makes a video or an image: `python Wan2.1/generate.py --task t2v-1.3B --ckpt_dir FOLDER --prompt ...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # runs from a checkout that is not installed

from wan21.generate import main

if __name__ == "__main__":
    sys.exit(main())
