# The server on CPUs, with tiny:
#   docker build -t antiphon .
#   docker run -p 8000:8000 -e ANTIPHON_API_KEYS=secret antiphon
# Where torch is a CUDA build by default, TORCH_INDEX (a build argument) names an index of CPU builds: they are far smaller.
FROM python:3.11-slim AS build
ARG TORCH_INDEX=""
WORKDIR /src
COPY constraints.txt ./
RUN python -m venv /opt/antiphon && \
    /opt/antiphon/bin/pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
COPY pyproject.toml README.md LICENSE ./
COPY antiphon ./antiphon
RUN /opt/antiphon/bin/pip install --no-cache-dir --constraint constraints.txt ".[serve]"

FROM python:3.11-slim
RUN useradd --create-home --uid 1000 antiphon
COPY --from=build /opt/antiphon /opt/antiphon
USER antiphon
WORKDIR /home/antiphon
ENV PATH=/opt/antiphon/bin:$PATH
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=90s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["antiphon", "serve"]
CMD ["tiny", "--host", "0.0.0.0"]
