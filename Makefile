# Two commands: `make demo` shows Testudo at work, `make test` checks everything.
# Each sets up what it needs first. All the rest is in `cargo xtask --help`.

XTASK = ./ci/bootstrap.sh xtask

.PHONY: demo test setup

demo:
	@$(XTASK) demo

test:
	@$(XTASK) test

setup:
	@$(XTASK) setup
