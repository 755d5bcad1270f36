# Build it:  docker build --tag lukhas-mcp .
# Run it:    docker run --publish 127.0.0.1:8766:8766 --env LUKHAS_MCP_API_KEYS=ops:admin:change-me \
#                --volume "$PWD:/repo" --volume lukhas-data:/data lukhas-mcp
# It listens on every address of the container, so it refuses to start without keys.
FROM python:3.13.9-slim-bookworm

# The version of git is the base image's own, which the tag above pins.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/* \
    && git config --system --add safe.directory /repo \
    && install --directory --owner=10001 --group=10001 /data /repo
RUN pip install --no-cache-dir uvloop==0.23.0 orjson==3.13.0
COPY lukhas_mcp.py cockpit.html /app/

ENV HOST=0.0.0.0 \
    PORT=8766 \
    LUKHAS_REPO_ROOT=/repo \
    LUKHAS_MCP_STATE_DIR=/data \
    LUKHAS_MCP_DB=/data/lukhas-mcp.db \
    MCP_STATE_PATH=/data/mcp-state.json \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /repo
VOLUME ["/data", "/repo"]
EXPOSE 8766
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s CMD ["python", "/app/lukhas_mcp.py", "probe"]
ENTRYPOINT ["python", "/app/lukhas_mcp.py"]
