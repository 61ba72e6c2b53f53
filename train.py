"""python train.py algo=nft dynamics=cps · see conf/ for the groups and README.md for what composes."""

from flowalign.run import main

if __name__ == "__main__":
    main()
