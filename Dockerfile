# Cake in a container: `docker build -t cake .`; for NVIDIA GPUs `docker build --build-arg TORCH=cu126 -t cake .`
# Builds for linux/amd64 and linux/arm64: `docker buildx build --platform linux/amd64,linux/arm64 .`
FROM python:3.12-slim-bookworm AS build

ARG TORCH=cpu
WORKDIR /src
COPY cake_core cake_core
COPY cake_server cake_server
COPY plugins plugins
RUN python -m venv /opt/cake \
 && /opt/cake/bin/pip install --no-cache-dir --index-url https://download.pytorch.org/whl/${TORCH} torch \
 && /opt/cake/bin/pip install --no-cache-dir \
      "./cake_core[hub]" ./cake_server ./plugins/cake_transport_tcp ./plugins/cake_llama ./plugins/cake_sd ./plugins/cake_emoji

FROM python:3.12-slim-bookworm

COPY --from=build /opt/cake /opt/cake
# The key and downloads are kept in the mounted folder: containers come and go.
ENV PATH=/opt/cake/bin:$PATH \
    CAKE_CONFIG_DIR=/data/cake \
    CAKE_CACHE_DIR=/data/cake/cache \
    HF_HOME=/data/huggingface \
    PYTHONUNBUFFERED=1
VOLUME /data
WORKDIR /data
EXPOSE 8080 10128
CMD ["cake-cli", "--help"]
