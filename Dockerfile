# The app in a container. CPU:  docker build -t flatlora .
# GPU:  docker build -t flatlora --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cuNNN .  (which: pytorch.org)
# Run:  docker run --rm -p 127.0.0.1:7860:7860 -e FLATLORA_AUTH=user:password -v flatlora-runs:/runs [--gpus all] flatlora
# then open http://localhost:7860. For another name in the address line add at the end:
#   flatlora app --host 0.0.0.0 --runs_dir /runs --allowed_host NAME
FROM python:3.12-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY . /source
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" $(sed -n 's/^# \(torch==.*\)/\1/p' /source/requirements.lock) \
    && pip install --no-cache-dir -c /source/requirements.lock "/source[app,report]" \
    && rm -rf /source

RUN useradd --create-home flatlora && mkdir /runs && chown flatlora /runs
USER flatlora
WORKDIR /runs
VOLUME /runs
EXPOSE 7860
# Inside the container 0.0.0.0 is the container's own network; `-p 127.0.0.1:...` above keeps others out. The app still
# wants a login for it, in FLATLORA_AUTH.
CMD ["flatlora", "app", "--host", "0.0.0.0", "--runs_dir", "/runs"]
