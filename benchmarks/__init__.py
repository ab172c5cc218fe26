"""Speed and memory of Photon, measured against hand-written loops; run by hand, never asserted in tests."""
