package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strings"
	"time"
)

// checkTimeout bounds every check; probes of the manifests wait five seconds.
const checkTimeout = 2 * time.Second

// Check is one thing that must hold. It returns the reason when it does not,
// and gives up when its context ends.
type Check func(context.Context) error

// Metric is one line of /metrics. Its name may carry constant labels; nothing
// in it ever comes from a request.
type Metric struct {
	Name  string // such as relay_webhooks_total or relay_info{role="server"}
	Kind  string // counter or gauge
	Help  string
	Value func() int64
}

// Health answers probes and scrapes. It knows nothing of what it reports on.
type Health struct {
	Info    map[string]string // constant facts for /health: role, version
	Live    Check             // nil error unless the process is stuck
	Ready   Check             // nil error while it should get traffic
	Metrics []Metric
}

// ServeHTTP is the route table.
func (h *Health) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "method not allowed", http.StatusMethodNotAllowed)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), checkTimeout)
	defer cancel()
	switch r.URL.Path {
	case "/live":
		h.probe(w, h.Live(ctx))
	case "/ready":
		h.probe(w, h.Ready(ctx))
	case "/health":
		h.summary(ctx, w)
	case "/metrics":
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		io.WriteString(w, h.exposition())
	default:
		http.NotFound(w, r)
	}
}

func (h *Health) probe(w http.ResponseWriter, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	io.WriteString(w, "ok\n")
}

// summary is both checks and the facts in JSON; 503 when one check fails.
func (h *Health) summary(ctx context.Context, w http.ResponseWriter) {
	doc := map[string]string{"status": "ok"}
	maps.Copy(doc, h.Info)
	status := http.StatusOK
	for name, check := range map[string]Check{"live": h.Live, "ready": h.Ready} {
		doc[name] = "ok"
		if err := check(ctx); err != nil {
			doc[name], doc["status"], status = err.Error(), "failing", http.StatusServiceUnavailable
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(doc)
}

// exposition is the Prometheus text format, version 0.0.4
// (https://prometheus.io/docs/instrumenting/exposition_formats/).
// Metrics of one family must stand together.
func (h *Health) exposition() string {
	var b strings.Builder
	family := ""
	for _, m := range h.Metrics {
		name, _, _ := strings.Cut(m.Name, "{")
		if name != family {
			fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %s %s\n", name, m.Help, name, m.Kind)
			family = name
		}
		fmt.Fprintf(&b, "%s %d\n", m.Name, m.Value())
	}
	return b.String()
}
