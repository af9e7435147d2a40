import os
import sys

# A run starts hundreds of Python processes: none should compile every module again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
