# Gateway and agent in one image:
#
#     docker build -t gotunnel .
#     docker run -p 80:80 -p 443:443 -p 9443:9443 --env-file .env -v gotunnel:/var/lib/gotunnel gotunnel
#     docker run -v ./agent.yaml:/var/lib/gotunnel/config.yaml:ro --entrypoint gotunnel-agent gotunnel
#     docker run -e GOTUNNEL_JOIN -v gotunnel-agent:/var/lib/gotunnel --entrypoint gotunnel gotunnel \
#         http site:8000
#
# compose.yaml runs both, and a site, to try them. The gateway drains for DRAIN_TIMEOUT seconds when it
# is stopped, 15 by default, of which Docker grants 10: `docker stop -t 20`. The agent takes less than
# ten.

ARG PYTHON=python:3.13-slim
FROM ${PYTHON}

# setup.py reads the version out of gotunnel.py, and the description out of README.md.
WORKDIR /src
COPY setup.py pyproject.toml gotunnel.py README.md LICENSE ./
COPY gotunnel_server gotunnel_server
COPY gotunnel_agent gotunnel_agent
COPY conf conf
RUN pip install --no-cache-dir '.[http2]'
COPY conf /usr/share/gotunnel/conf

# A user without rights, with the same number in each build: its files in a volume stay its own. It
# may listen on 80 and 443 nevertheless, because Docker sets net.ipv4.ip_unprivileged_port_start=0 in
# each container (since 20.10); elsewhere, give that as --sysctl. With --network=host there is no such
# setting: choose ports above 1023. The last two folders are for the status sockets. Its home folder is
# the volume, where `gotunnel` keeps what it has to remember.
RUN useradd --system --uid 850 --home-dir /var/lib/gotunnel gotunnel \
    && install -d -o gotunnel -g gotunnel -m 700 \
        /var/lib/gotunnel /run/gotunnel-server /run/gotunnel-agent
USER gotunnel

# Certificates, keys, and the account with the CA, to be kept over restarts.
ENV ACME_CACHE=/var/lib/gotunnel
WORKDIR /var/lib/gotunnel
VOLUME /var/lib/gotunnel

# A CA and plain HTTP, visitors, agents, dashboard. Publish the last only where it is meant to be seen.
EXPOSE 80 443 9443 8080

# Asks the one of the two that runs here; `gotunnel http` and the like cannot be asked. Docker knows
# only the exit status 1. Each look starts a Python, some 0.3 s of CPU time.
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s --retries=3 CMD ["sh", "-c", \
    "program=$(grep -aoE 'gotunnel-(agent|server)' /proc/1/cmdline | head -n 1); \
    [ -z $program ] || $program status > /dev/null || exit 1"]

ENTRYPOINT ["gotunnel-server"]
