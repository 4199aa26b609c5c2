# keysync on a CPU. Build: docker build -t keysync .     Run: docker run --rm -v keysync-cache:/cache -v "$PWD:/work" keysync demo -o demo
FROM python:3.12-slim AS build
WORKDIR /src
COPY . .
RUN python -m venv /opt/keysync
RUN /opt/keysync/bin/pip install --no-cache-dir .

FROM python:3.12-slim
COPY --from=build /opt/keysync /opt/keysync
RUN useradd --create-home keysync && mkdir -p /cache /work && chown keysync /cache /work
ENV PATH=/opt/keysync/bin:$PATH XDG_CACHE_HOME=/cache
USER keysync
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["keysync"]
CMD ["--help"]
