# The gateway:
#
#     docker build -t gotunnel .
#     docker run -p 80:80 -p 443:443 -p 9443:9443 --env-file .env -v gotunnel:/var/lib/gotunnel gotunnel
#
# It drains for DRAIN_TIMEOUT seconds when it is stopped, 15 by default, of which Docker grants 10:
# `docker stop -t 20`. The agent is in the image as well: `--entrypoint gotunnel-agent`; it takes less
# than ten.

FROM python:3.13-slim

# setup.py reads the version out of gotunnel.py.
WORKDIR /src
COPY setup.py gotunnel.py LICENSE ./
COPY gotunnel_server gotunnel_server
COPY gotunnel_agent gotunnel_agent
RUN pip install --no-cache-dir '.[server]'

# A user without rights. It may listen on 80 and 443 nevertheless, because Docker sets
# net.ipv4.ip_unprivileged_port_start=0 in each container (since 20.10); elsewhere, give that as
# --sysctl. With --network=host there is no such setting: choose ports above 1023.
RUN useradd --system gotunnel && install -d -o gotunnel -g gotunnel -m 700 /var/lib/gotunnel
USER gotunnel

# Certificates, keys, and the account with the CA, to be kept over restarts.
ENV ACME_CACHE=/var/lib/gotunnel
WORKDIR /var/lib/gotunnel
VOLUME /var/lib/gotunnel

# A CA and plain HTTP, visitors, agents, dashboard. Publish the last only where it is meant to be seen.
EXPOSE 80 443 9443 8080

ENTRYPOINT ["gotunnel-server"]
