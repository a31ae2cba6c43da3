"""Lightning callbacks for normalization as preconditioning.

The package imports without Lightning; its callbacks, which need the extra ``bnp-optim[lightning]``, follow in a
later release.
"""

__all__: list[str] = []
