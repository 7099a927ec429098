# The app in a container; BuildKit builds it, Docker's default since 23. CPU:  docker build -t flatlora .
# GPU:  docker build -t flatlora --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cuNNN .  (which: pytorch.org)
# Run:  docker run --rm -p 127.0.0.1:7860:7860 -e FLATLORA_AUTH=user:password [--gpus all]
#         -v flatlora-runs:/runs -v flatlora-hub:/hub flatlora
# then open http://localhost:7860. For another name in the address line add at the end:
#   flatlora app --host 0.0.0.0 --runs_dir /runs --allowed_host NAME
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# What is installed is mounted, not copied, so that no layer holds it. PyTorch's layer changes with the lock alone.
RUN --mount=type=bind,source=requirements.lock,target=/requirements.lock \
    pip install --no-cache-dir --index-url "$TORCH_INDEX" $(sed -n 's/^# \(torch==.*\)/\1/p' /requirements.lock)
RUN --mount=type=bind,target=/source,rw \
    pip install --no-cache-dir -c /source/requirements.lock "/source[app,report]"

# Models from the hub go to /hub, a volume as the runs are: a new container downloads none again.
ENV HF_HOME=/hub
RUN useradd --create-home flatlora && mkdir /runs /hub && chown flatlora /runs /hub
USER flatlora
WORKDIR /runs
VOLUME /runs /hub
EXPOSE 7860
# Inside the container 0.0.0.0 is the container's own network; `-p 127.0.0.1:...` above keeps others out. The app still
# wants a login for it, in FLATLORA_AUTH.
CMD ["flatlora", "app", "--host", "0.0.0.0", "--runs_dir", "/runs"]
