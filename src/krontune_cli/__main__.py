"""`python -m krontune_cli`, also for `accelerate launch -m krontune_cli train RUN.yaml`."""

from krontune_cli.app import main

main()
