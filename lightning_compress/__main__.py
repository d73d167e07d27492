"""`python -m lightning_compress` is the command `lightning-compress`."""

from lightning_compress.cli.app import main

if __name__ == "__main__":
    main()
