"""What works on a GPU: `pytest -m gpu`. With LITGPT_TEST_DEVICE=cpu these tests run, as a dry run, without one."""
