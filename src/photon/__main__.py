"""`python -m photon`: the same as the command `photon`."""

from photon.cli import main

if __name__ == "__main__":
    main()
