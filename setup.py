from setuptools import setup
setup(name="grao-fast", version="0.0.1", packages=["grao_fast","grao_fast.kernels","grao_fast.rollout","grao_fast.rewards","grao_fast.demo"], package_dir={"grao_fast":"grao_fast","grao_fast.kernels":"kernels"})
