.PHONY: install style test test-gpu docs bench bench-gpu report

OUT ?= benchmarks/results

install:
	pip install -e '.[dev]'
	pre-commit install || true

style:
	ruff check .
	ruff format --check .
	mypy
	.ci/pages

test:
	pytest -n logical --dist loadfile

test-gpu:
	pytest -m gpu

docs:
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict

bench:
	python -m benchmarks.run --out $(OUT) $(MKL)

bench-gpu:
	OUT=$(OUT) benchmarks/gpu.sh

report:
	python -m benchmarks.report.page
