"""What all tests share: they import the chapters from the folder above. (Grading: grading.py.)"""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # before torch; see unclip.py
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
sys.path.insert(0, str(Path(__file__).parent.parent))
