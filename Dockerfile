# A release pins this image by its digest, golang:1.26@sha256:…, which
# "docker buildx imagetools inspect golang:1.26" prints.
FROM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY *.go ./
ARG VERSION=""
RUN CGO_ENABLED=0 go build -trimpath -ldflags="-s -w -X main.release=${VERSION}" -o /webhook-relay .

FROM scratch
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /webhook-relay /webhook-relay
USER 65532:65532
EXPOSE 3000 9000
ENTRYPOINT ["/webhook-relay"]
