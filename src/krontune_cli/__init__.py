"""The `krontune` command. A package of its own: `krontune --help` must not import krontune, which imports torch."""
