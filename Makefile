.PHONY: quick test site readme

quick:   # what has changed: export, ruff and the rules of the house, the changed notebooks, the tests that belong to them
	python tests/quick.py

test:    # everything
	nbdev-test --n-workers 2 && pytest

site:
	python docs/build.py

readme:
	python docs/readme.py
