package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// fine and broken are what checks test.
func fine(context.Context) error { return nil }

func broken(context.Context) error { return errors.New("bus is down") }

// reportOn is a Health of a server with two checks.
func reportOn(live, ready func(context.Context) error) *Health {
	return &Health{
		Info:   map[string]string{"role": "server"},
		Checks: []Check{{"hub", "live", live}, {"redis", "ready", ready}},
		State:  func() any { return map[string]int{"streams": 0} }, Journal: &Journal[Passage]{},
	}
}

// TestHealthRoutes is the route table: a probe is 200 or 503 with the reason,
// and nothing but GET and HEAD asks.
func TestHealthRoutes(t *testing.T) {
	const text = "text/plain; charset=utf-8"
	tests := []struct {
		request     string
		live, ready func(context.Context) error
		status      int
		body, kind  string
	}{
		{"GET /live", fine, broken, 200, "ok\n", text},
		{"GET /live", broken, fine, 503, "hub: bus is down\n", text},
		{"GET /ready", broken, fine, 200, "ok\n", text},
		{"GET /ready", fine, broken, 503, "redis: bus is down\n", text},
		{"HEAD /live", fine, fine, 200, "", ""},
		{"HEAD /ready", fine, broken, 503, "", text},
		{"GET /health", fine, fine, 200, `"live":"ok","ready":"ok","role":"server","status":"ok"}` + "\n", "application/json"},
		{"GET /health", fine, broken, 503, `"live":"ok","ready":"redis: bus is down","role":"server","status":"failing"}` + "\n", "application/json"},
		{"GET /health", broken, broken, 503, `"live":"hub: bus is down","ready":"redis: bus is down","role":"server","status":"failing"}` + "\n", "application/json"},
		{"HEAD /health", fine, fine, 200, "", "application/json"},
		{"GET /metrics", broken, broken, 200, "\ngo_memstats_sys_bytes", "text/plain; version=0.0.4; charset=utf-8"},
		{"GET /", fine, fine, 200, "<!doctype html>", "text/html; charset=utf-8"},
		{"GET /status", fine, fine, 200, `"server":{"streams":0}`, "application/json"},
		{"GET /live/", fine, fine, 404, "404 page not found\n", text},
		{"GET /subscribe/ci", fine, fine, 404, "404 page not found\n", text},
		{"POST /ready", fine, fine, 405, "method not allowed\n", text},
		{"DELETE /nothing", fine, fine, 405, "method not allowed\n", text},
	}
	for _, tt := range tests {
		server := httptest.NewServer(reportOn(tt.live, tt.ready))
		method, path, _ := strings.Cut(tt.request, " ")
		status, body, header := send(t, method, server.URL+path, "")
		server.Close()
		if status != tt.status || !strings.Contains(body, tt.body) || tt.body == "" && body != "" || tt.kind != "" && header.Get("Content-Type") != tt.kind {
			t.Errorf("%s: got %d %q %q", tt.request, status, body, header.Get("Content-Type"))
		}
		if allow := header.Get("Allow"); (allow == "GET, HEAD") != (status == 405) {
			t.Errorf("%s: Allow is %q", tt.request, allow)
		}
	}
}

// TestHealthCheckTimeout checks that a check which hangs is given up long before
// the one who probes gives up.
func TestHealthCheckTimeout(t *testing.T) {
	hang := func(ctx context.Context) error {
		<-ctx.Done()
		return errors.New("hangs")
	}
	for _, path := range []string{"/live", "/ready", "/health"} {
		synctest.Test(t, func(t *testing.T) {
			w := httptest.NewRecorder()
			begin := time.Now()
			reportOn(hang, hang).ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", path, nil))
			if took := time.Since(begin); took != checkTimeout || w.Code != 503 || !strings.Contains(w.Body.String(), "hangs") {
				t.Errorf("%s: %d %q after %s", path, w.Code, w.Body, took)
			}
		})
	}
}

// TestSinceWhen: /health and the page tell since when a check holds or does not,
// although nobody asked when that changed, and what its last error was.
func TestSinceWhen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var down atomic.Bool
		h := reportOn(fine, func(context.Context) error {
			if down.Load() {
				return errors.New("no route")
			}
			return nil
		})
		ctx, stop := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { h.Run(ctx) })
		begin := time.Now()
		ask := func() (v verdict) {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), "GET", "/health", nil))
			var doc struct{ Checks []verdict }
			if err := json.Unmarshal(w.Body.Bytes(), &doc); err != nil || len(doc.Checks) != 2 {
				t.Fatalf("%v in %s", err, w.Body)
			}
			return doc.Checks[1]
		}
		synctest.Wait()
		if v := ask(); !v.OK || v.Of != "ready" || v.Name != "redis" || !v.Since.Equal(begin) || v.Error != "" || v.ErrorAt != nil {
			t.Errorf("at the start: %+v", v)
		}
		time.Sleep(time.Minute + checkInterval/2)
		down.Store(true)
		time.Sleep(time.Minute)
		broke := begin.Add(time.Minute + checkInterval)
		if v := ask(); v.OK || !v.Since.Equal(broke) || v.Error != "no route" || v.ErrorAt == nil || !v.ErrorAt.Equal(time.Now()) {
			t.Errorf("after it broke: %+v", v)
		}
		down.Store(false)
		last := time.Now()
		time.Sleep(time.Minute)
		if v := ask(); !v.OK || !v.Since.Equal(last.Add(checkInterval/2)) || v.Error != "no route" || !v.ErrorAt.Equal(last) {
			t.Errorf("after it was mended: %+v, the last error was at %s", v, last)
		}
		stop()
		running.Wait()
	})
}

// TestJournal: the latest entries are kept, the newest first, each as it was put
// last; what is older is gone and does not come back.
func TestJournal(t *testing.T) {
	var j Journal[int]
	numbers := []uint64{}
	for i := range 3 * journalSize {
		if list := j.latest().([]int); len(list) != min(i, journalSize) || i > 0 && list[0] != i-1 {
			t.Fatalf("entries after %d: %v", i, list)
		}
		numbers = append(numbers, j.Put(0, i))
	}
	first := 2 * journalSize
	for i, n := range slices.Backward(numbers) {
		if j.Put(n, -i) != n {
			t.Errorf("entry %d has another number now", n)
		}
	}
	list := j.latest().([]int)
	for i := range list {
		if want := -(first + journalSize - 1 - i); list[i] != want {
			t.Fatalf("entry %d is %v, want %d", i, list[i], want)
		}
	}
}

// TestSeries: each point tells of ten seconds, the oldest of those ten minutes ago;
// quantiles are near.
func TestSeries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j Journal[int]
		time.Sleep(seriesStep*time.Second - time.Duration(time.Now().UnixNano()%int64(seriesStep*time.Second)))
		for point := range 2*seriesSize + 7 {
			for i := range point {
				took := 4 * time.Millisecond
				if i == 0 {
					took = 2 * time.Second
				}
				j.Count(took, i%10 == 0)
			}
			time.Sleep(seriesStep * time.Second)
			s := j.series(time.Now())
			last := seriesSize - 1
			if s.Webhooks[last] != point || s.Failures[last] != (point+9)/10 || len(s.P50) != seriesSize || s.Until%seriesStep != 0 || s.Until != time.Now().Unix() {
				t.Fatalf("point %d: %d, %d failed, until %d", point, s.Webhooks[last], s.Failures[last], s.Until)
			}
			for i, n := range s.Webhooks {
				want := max(0, point-last+i)
				if n != want || (s.P50[i] == nil) != (want == 0) {
					t.Fatalf("at point %d, %d is %d, want %d", point, i, n, want)
				}
				if want > 2 && (*s.P50[i] < 3 || *s.P50[i] > 5 || want < 100 && (*s.P99[i] < 1700 || *s.P99[i] > 2400)) {
					t.Fatalf("of %d: p50 %v ms, p99 %v ms", n, *s.P50[i], *s.P99[i])
				}
			}
		}
		time.Sleep(time.Hour)
		for _, n := range j.series(time.Now()).Webhooks {
			if n != 0 {
				t.Fatalf("%d an hour later", n)
			}
		}
	})
}

// TestEventsOfPage: a page is sent the document at once, within half a second when
// something has changed, and now and then otherwise; there is space for a few.
func TestEventsOfPage(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		p := newPipes()
		h := reportOn(fine, fine)
		web := &http.Server{Handler: h}
		var serving sync.WaitGroup
		serving.Go(func() { web.Serve(p) })
		rt := p.transport(t, false)
		open := func() (*http.Response, error) {
			return rt.RoundTrip(must(http.NewRequestWithContext(t.Context(), "GET", "http://relay.test/events", nil)))
		}
		resp, err := open()
		if err != nil || resp.Header.Get("Content-Type") != "text/event-stream" {
			t.Fatalf("%v, %v", resp, err)
		}
		read := newParser(resp.Body)
		next := func() (doc struct {
			Now      time.Time
			Webhooks []Passage
		}) {
			m, err := read.next()
			if err == nil {
				err = json.Unmarshal(m.data, &doc)
			}
			if err != nil {
				t.Fatalf("%v in %q", err, m.data)
			}
			return doc
		}
		if doc := next(); len(doc.Webhooks) != 0 || !doc.Now.Equal(time.Now()) {
			t.Errorf("first: %+v", doc)
		}
		h.Journal.(*Journal[Passage]).Put(0, Passage{Event: "one", Path: "/webhooks/ci/<b>"})
		put := time.Now()
		if doc := next(); len(doc.Webhooks) != 1 || doc.Webhooks[0].Path != "/webhooks/ci/<b>" || time.Since(put) > viewInterval {
			t.Errorf("after %s: %+v", time.Since(put), doc)
		}
		put = time.Now()
		if doc := next(); len(doc.Webhooks) != 1 || time.Since(put) > viewLonely+viewInterval {
			t.Errorf("after %s: %+v", time.Since(put), doc)
		}
		for range viewersLimit - 1 {
			if resp, err := open(); err != nil || resp.StatusCode != 200 {
				t.Fatalf("%v, %v", resp, err)
			}
		}
		if resp, err := open(); err != nil || resp.StatusCode != 503 {
			t.Errorf("one too many: %v, %v", resp, err)
		}
		web.Close()
		serving.Wait()
	})
}

// TestExposition holds the metrics format to the letter.
func TestExposition(t *testing.T) {
	var n atomic.Int64
	n.Store(7)
	kinds := newTally("y", "x")
	kinds["y"].Store(1 << 40)
	var took Histogram
	for _, d := range []time.Duration{-time.Second, time.Millisecond, 1001 * time.Microsecond, time.Minute, time.Hour} {
		took.Observe(d)
	}
	h := &Health{Metrics: []Metric{
		counter("relay_a_total", "Things.", &n),
		tallied("relay_b_total", "Kinds.", "kind", kinds),
		gauge("relay_c", "Last.", func() float64 { return -0.25 }),
		histogram("relay_d_seconds", "Times.", &took),
		{"relay_e", "gauge", "None.", func(sampler) {}},
	}}
	const want = `# HELP relay_a_total Things.
# TYPE relay_a_total counter
relay_a_total 7
# HELP relay_b_total Kinds.
# TYPE relay_b_total counter
relay_b_total{kind="x"} 0
relay_b_total{kind="y"} 1.099511627776e+12
# HELP relay_c Last.
# TYPE relay_c gauge
relay_c -0.25
# HELP relay_d_seconds Times.
# TYPE relay_d_seconds histogram
relay_d_seconds_bucket{le="0.001"} 2
relay_d_seconds_bucket{le="0.0025"} 3
relay_d_seconds_bucket{le="0.005"} 3
relay_d_seconds_bucket{le="0.01"} 3
relay_d_seconds_bucket{le="0.025"} 3
relay_d_seconds_bucket{le="0.05"} 3
relay_d_seconds_bucket{le="0.1"} 3
relay_d_seconds_bucket{le="0.25"} 3
relay_d_seconds_bucket{le="0.5"} 3
relay_d_seconds_bucket{le="1"} 3
relay_d_seconds_bucket{le="2.5"} 3
relay_d_seconds_bucket{le="5"} 3
relay_d_seconds_bucket{le="10"} 3
relay_d_seconds_bucket{le="30"} 3
relay_d_seconds_bucket{le="60"} 4
relay_d_seconds_bucket{le="+Inf"} 5
relay_d_seconds_sum 3660.002001
relay_d_seconds_count 5
`
	if got := h.exposition(); !strings.HasPrefix(got, want+"# HELP process_") {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestMetrics reads what both roles expose as Prometheus does, by the rules of its
// parsers and of promtool's lint
// (https://prometheus.io/docs/instrumenting/exposition_formats/,
// https://prometheus.io/docs/practices/naming/,
// https://prometheus.io/docs/specs/om/open_metrics_spec/): every family stands
// together under its own help and type, once; names have their unit and say what
// they count; no family takes the name of another one's samples; histograms add up.
func TestMetrics(t *testing.T) {
	hub := &Hub{Budget: &Budget{}}
	server := must(NewServer(ServerOptions{}, hub, hub, nil))
	client := func(channel string) *Client {
		return NewClient(ClientOptions{
			Source: must(url.Parse("http://relay.test/subscribe/" + channel)), Target: must(url.Parse("http://target.test")), Concurrency: 1,
		}, slog.New(slog.DiscardHandler))
	}
	for role, metrics := range map[string][]Metric{
		"server":            serverMetrics(server, hub, nil, &door{}),
		"server with Redis": serverMetrics(server, hub, &RedisBus{}, &door{}),
		"client":            clientMetrics([]*Client{client("a"), client("b")}),
	} {
		t.Run(role, func(t *testing.T) {
			for _, mistake := range lint((&Health{Metrics: metrics}).exposition()) {
				t.Error(mistake)
			}
		})
	}
	// The rules find what they are there for.
	const begin = "# HELP relay_a_total A.\n# TYPE relay_a_total counter\nrelay_a_total 1\n"
	for _, bad := range []string{
		"relay_a_total 1\n", begin + begin, begin + "relay_a_total 1\n", begin + "relay_b 1\n",
		begin + "# HELP relay_a A.\n# TYPE relay_a gauge\nrelay_a 1\n",
		"# HELP relay_a A.\n# TYPE relay_a counter\nrelay_a 1\n", "# HELP relay_a_total A.\n# TYPE relay_a_total gauge\nrelay_a_total 1\n",
		"# HELP relay_a_ms A.\n# TYPE relay_a_ms gauge\nrelay_a_ms 1\n", "# HELP relayA A.\n# TYPE relayA gauge\nrelayA 1\n",
		"# HELP relay_a_seconds A.\n# TYPE relay_a_seconds histogram\nrelay_a_seconds_bucket{le=\"1\"} 2\nrelay_a_seconds_bucket{le=\"+Inf\"} 1\nrelay_a_seconds_sum 1\nrelay_a_seconds_count 1\n",
		"# HELP relay_a_seconds A.\n# TYPE relay_a_seconds histogram\nrelay_a_seconds_bucket{le=\"1\"} 1\nrelay_a_seconds_sum 1\nrelay_a_seconds_count 1\n",
		"# HELP relay_a A.\n# TYPE relay_a gauge\nrelay_a{x=y} 1\n", "# HELP relay_a A.\n# TYPE relay_a gauge\nrelay_a one\n", "# HELP relay_a A.\n# TYPE relay_a gauge\nrelay_a 1",
	} {
		if len(lint(bad)) == 0 {
			t.Errorf("no mistake is found in\n%s", bad)
		}
	}
}

var (
	sampleLine = regexp.MustCompile(`^([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\]|\\[\\"n])*",?)+)\})? (\S+)$`)
	leLabel    = regexp.MustCompile(`,?le="([^"]*)"`)
	badUnit    = regexp.MustCompile(`_(ms|milliseconds|microseconds|nanoseconds|minutes|hours|days|kb|mb|kilobytes|megabytes|bits|percent)(_|$)`)
)

// lint is what is wrong with a text of metrics.
func lint(text string) (mistakes []string) {
	wrong := func(format string, args ...any) { mistakes = append(mistakes, fmt.Sprintf(format, args...)) }
	kinds, seen := map[string]string{}, map[string]bool{}
	last := map[string]float64{} // of a histogram's buckets, by its name and other labels
	ends := map[string]float64{} // their +Inf
	family := ""
	if !strings.HasSuffix(text, "\n") {
		wrong("no line end at the end")
	}
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		fields := strings.SplitN(line, " ", 4)
		if len(fields) == 4 && fields[0] == "#" {
			if fields[1] == "HELP" {
				family = fields[2]
				if _, twice := kinds[family]; twice || !strings.HasSuffix(line, ".") {
					wrong("help %q", line)
				}
				kinds[family] = ""
			} else {
				kinds[family] = fields[3]
				if fields[1] != "TYPE" || fields[2] != family || (fields[3] == "counter") != strings.HasSuffix(family, "_total") {
					wrong("type %q under %s", line, family)
				}
			}
			continue
		}
		m := sampleLine.FindStringSubmatch(line)
		if m == nil {
			wrong("line %q", line)
			continue
		}
		value, err := strconv.ParseFloat(m[3], 64)
		suffix, ok := strings.CutPrefix(m[1], family)
		allowed := map[string][]string{"counter": {""}, "gauge": {""}, "summary": {"", "_sum", "_count"}, "histogram": {"_bucket", "_sum", "_count"}}[kinds[family]]
		if err != nil || !ok || family == "" || !slices.Contains(allowed, suffix) {
			wrong("sample %q under %s", line, family)
		}
		if seen[m[1]+m[2]] {
			wrong("sample %q comes twice", line)
		}
		seen[m[1]+m[2]] = true
		if kinds[family] == "histogram" {
			one := family + leLabel.ReplaceAllString(m[2], "")
			switch suffix {
			case "_bucket":
				if value < last[one] {
					wrong("bucket %q is less than the one before", line)
				}
				last[one] = value
				if strings.Contains(m[2], `le="+Inf"`) {
					ends[one] = value
				}
			case "_count":
				if end, ok := ends[one]; !ok || end != value {
					wrong("count %q is not that of all buckets", line)
				}
			}
		}
	}
	for name, kind := range kinds {
		base := strings.TrimSuffix(name, "_total")
		_, clash := kinds[base]
		if clash && base != name && !strings.HasPrefix(name, "go_memstats_") { // as Prometheus' own client has it
			wrong("%s and %s are one family in OpenMetrics", name, base)
		}
		if !regexp.MustCompile(`^(relay|process|go)_[a-z_]+$`).MatchString(name) || badUnit.MatchString(name) || kind == "" {
			wrong("name %s (%s)", name, kind)
		}
		if (kind == "histogram") && !strings.HasSuffix(name, "_seconds") {
			wrong("%s has no unit", name)
		}
	}
	return mistakes
}

// TestMetricsOfHeld: a held webhook is counted once it has ended, with an answer
// or without, and every heartbeat of every stream is.
func TestMetricsOfHeld(t *testing.T) {
	rigTest(t, []string{"RESPONSE_MODE=status", "SERVER_HEARTBEAT_INTERVAL=2s"}, func(t *testing.T, p *pipes, r *rig) {
		rt := p.transport(t, false)
		check := func(when string, answered, unanswered, heartbeats int) {
			t.Helper()
			synctest.Wait()
			text := (&Health{Metrics: serverMetrics(r.Server, r.hub, nil, &door{})}).exposition()
			for _, sample := range []string{
				fmt.Sprintf("\nrelay_webhooks_total{outcome=\"answered\",reason=\"\"} %d\n", answered),
				fmt.Sprintf("\nrelay_webhook_answer_seconds_count %d\n", answered),
				fmt.Sprintf("\nrelay_webhooks_total{outcome=\"refused\",reason=\"nobody\"} %d\n", min(unanswered, 1)),
				fmt.Sprintf("\nrelay_webhooks_total{outcome=\"refused\",reason=\"gone\"} %d\n", max(unanswered-1, 0)),
				fmt.Sprintf("\nrelay_heartbeats_total %d\n", heartbeats),
			} {
				if !strings.Contains(text, sample) {
					t.Errorf("%s: no %q in\n%s", when, sample, text)
				}
			}
		}
		listeners := []*listener{listen(t, rt, streamURL, features...), listen(t, rt, streamURL, features...)}
		told := make(chan outcome)
		hold := func(ctx context.Context) { go func() { told <- post(ctx, rt, "POST", hooksURL, "x") }() }
		time.Sleep(5 * time.Second)
		check("at the start", 0, 0, 4)

		for n := 1; n <= 2; n++ {
			hold(t.Context())
			id := listeners[0].next(t, n).webhook(t).ID
			check("held", n-1, 0, 4)
			listeners[0].report(t, rt, id, Answer{Status: 200})
			if got := <-told; got.status != 200 {
				t.Errorf("answer %+v, want 200", got)
			}
			check("answered", n, 0, 4)
		}

		for _, l := range listeners {
			l.close()
			<-l.done
		}
		synctest.Wait()
		hold(t.Context())
		if got := <-told; got.status != 503 {
			t.Errorf("answer %+v, want 503", got)
		}
		check("nobody came", 2, 1, 4)
		ctx, hangUp := context.WithCancel(t.Context())
		hold(ctx)
		time.Sleep(time.Second)
		hangUp()
		<-told
		check("the sender hung up", 2, 2, 4)
	})
}

// TestProbesComeThrough: connections to the health port that are only there do
// not keep a probe out, and none stays after its answer.
func TestProbesComeThrough(t *testing.T) {
	t.Parallel()
	server := startServer(t, probed...)
	var conns []net.Conn
	for range probeConnections + 50 {
		conns = append(conns, connect(t, server.health))
	}
	half := connect(t, server.health)
	io.WriteString(half, "GET /live HTTP/1.1\r\nHost: x\r\n") // a header without an end
	for range 20 {
		for _, page := range []string{"/live", "/ready", "/health", "/metrics"} {
			conn := connect(t, server.health)
			io.WriteString(conn, "GET "+page+" HTTP/1.1\r\nHost: x\r\n\r\n")
			answer, err := io.ReadAll(conn) // comes to its end
			if err != nil || !strings.HasPrefix(string(answer), "HTTP/1.1 200 OK\r\n") || !strings.Contains(string(answer), "\r\nConnection: close\r\n") {
				t.Fatalf("%s: %.200q, %v", page, answer, err)
			}
		}
	}
	var open atomic.Int64
	for _, conn := range conns {
		open.Add(1)
		go func() { // ends with the connection
			conn.Read(make([]byte, 1))
			open.Add(-1)
		}()
	}
	eventually(t, "one address has half of the connections at most", func() bool { return open.Load() <= probeConnections/2 })
	half.SetReadDeadline(time.Now().Add(patience))
	begin := time.Now()
	if _, err := io.ReadAll(half); errors.Is(err, os.ErrDeadlineExceeded) || time.Since(begin) > probeTime+slack {
		t.Errorf("a header without an end is waited for: %v after %s", err, time.Since(begin))
	}
}

// must is for what cannot fail.
func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// The page, in a browser.

// TestPage: the page of both roles loads without a complaint, shows a webhook as
// it comes, outlives a restart, and takes nothing that strangers choose for
// markup.
func TestPage(t *testing.T) {
	t.Parallel()
	c := startChromium(t)
	health := fmt.Sprintf("HEALTH_SERVICE_PORT=%d", freePorts(t, 1)[0])
	env := []string{health, "HEALTH_SERVICE_SHUTDOWN_DELAY=0", "HEALTH_SERVICE_SHUTDOWN_HANDLER_TIMEOUT=1s", "RESPONSE_MODE=slow=status"}
	server := startServer(t, env...)
	release := make(chan string)
	target := newTarget(t, func(r recorded) string {
		if strings.Contains(r.line, "slow") {
			return <-release
		}
		return ok200
	})
	client := start(t, "RELAY_MODE=client", "HEALTH_SERVICE_PORT=0", "RECONNECT_INTERVAL=50", "TARGET_BASE_URL=http://user:hunter2@"+hostOf(target.url),
		fmt.Sprintf("SOURCE_URL=http://%[1]s/subscribe/ci/,http://%[1]s/subscribe/slow/", server.addr))
	eventually(t, "both streams", func() bool { return len(client.log.lines("stream ready")) == 2 })
	pages := map[string]*tab{"server": c.open("http://" + server.health + "/"), "client": c.open("http://" + client.health + "/")}
	holds := func(text string) string { return fmt.Sprintf("document.body.innerText.includes(%q)", text) }
	for role, p := range pages {
		p.await(holds(role))
		p.await(holds("No webhooks yet"))
		p.await(holds("ci"))
	}
	send(t, "POST", "http://"+server.addr+"/webhooks/ci/first?hunter2=1", "hunter2", "X-Secret", "hunter2")
	for _, p := range pages {
		p.await(holds("/webhooks/ci/first"))
	}
	pages["server"].await(holds("accepted"))
	pages["client"].await(holds("forwarded"))

	answered := make(chan outcome)
	go func() {
		answered <- post(t.Context(), http.DefaultTransport, "POST", "http://"+server.addr+"/webhooks/slow/one", "{}")
	}()
	pages["server"].await(holds("held"))
	pages["client"].await(holds("forwarding"))
	release <- "HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n"
	<-answered
	pages["server"].await(holds("answered"))

	const markup = `<img/src=x/onerror="document.title='owned'">`
	for _, target := range []string{"/webhooks/ci/" + markup, "/webhooks/" + markup, "/webhooks/<img onerror>"} {
		wire(t, server.addr, "POST "+target+" HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
	}
	pages["server"].await(holds("/webhooks/ci/" + markup))
	pages["server"].await(holds("/webhooks/<img/src"))
	pages["client"].await(holds("/webhooks/ci/" + markup))
	for role, p := range pages {
		if n := p.eval("document.images.length + document.querySelectorAll('iframe, object, embed').length"); n != 0.0 || p.eval("document.title.includes('owned')") == true {
			t.Errorf("%s: markup of a stranger is on the page", role)
		}
		if text := p.eval("document.documentElement.outerHTML").(string); strings.Contains(text, "hunter2") {
			t.Errorf("%s: a secret is on the page", role)
		}
		if list := p.complaints(); len(list) > 0 {
			t.Errorf("%s: %q", role, list)
		}
		for _, width := range []int{320, 1280} {
			p.look(width, 800, "dark")
			p.await("document.documentElement.scrollWidth <= innerWidth") // nothing beside the page
		}
	}

	if err := server.stop(); err != nil {
		t.Error(err)
	}
	pages["server"].await(holds("disconnected"))
	pages["client"].await(holds("failing"))
	again := startServer(t, env...)
	pages["server"].await("!" + holds("disconnected") + " && " + holds("No webhooks yet"))
	send(t, "POST", "http://"+again.addr+"/webhooks/ci/second", "{}")
	pages["server"].await(holds("/webhooks/ci/second"))
	for role, p := range pages { // that nobody was there is no fault of the page
		if list := p.complaints("network"); len(list) > 0 {
			t.Errorf("%s: %q", role, list)
		}
	}
}

// chromium is a headless Chromium that a test drives: its DevTools protocol,
// JSON messages that each end with a NUL, over two pipes. No port is opened.
type chromium struct {
	t       *testing.T
	process *exec.Cmd
	to      *os.File      // its fd 3
	ended   chan struct{} // closed when the process and the goroutine that reads have ended

	mu    sync.Mutex
	last  int                     // id of the last call
	calls map[int]chan devMessage // who waits for an answer, by id
	tabs  map[string]*tab         // by session
}

type tab struct {
	c       *chromium
	session string
	said    []string // see complaints; under c.mu
}

// devMessage is an answer to a call, or an event of a tab.
type devMessage struct {
	ID      int                       `json:"id"`
	Method  string                    `json:"method"`
	Params  json.RawMessage           `json:"params"`
	Result  json.RawMessage           `json:"result"`
	Error   *struct{ Message string } `json:"error"`
	Session string                    `json:"sessionId"`
}

// startChromium starts Chromium and ends it with the test.
func startChromium(t *testing.T) *chromium {
	t.Helper()
	path := need(t, "chromium", "chromium")
	// Not t.TempDir: what Chromium started may still write there for a moment
	// after it has ended, and t.TempDir would fail the test for that.
	profile, err := os.MkdirTemp("", "chromium")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for end := time.Now().Add(10 * time.Second); os.RemoveAll(profile) != nil && time.Now().Before(end); {
			time.Sleep(50 * time.Millisecond)
		}
	})
	itsIn, to, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	from, itsOut, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	// A file, not a buffer: Wait would wait for everybody who has the pipe.
	stderr, err := os.Create(filepath.Join(profile, "stderr"))
	if err != nil {
		t.Fatal(err)
	}
	c := &chromium{t: t, to: to, ended: make(chan struct{}), calls: map[int]chan devMessage{}, tabs: map[string]*tab{}}
	c.process = exec.Command(path, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
		"--user-data-dir="+profile, "--remote-debugging-pipe")
	c.process.ExtraFiles = []*os.File{itsIn, itsOut}
	c.process.Stderr = stderr
	err = c.process.Start()
	itsIn.Close()
	itsOut.Close()
	stderr.Close()
	if err != nil {
		t.Fatal(err)
	}
	go c.read(from)
	t.Cleanup(c.end)
	if err := c.ask("", "Browser.getVersion", nil, nil); err != nil {
		said, _ := os.ReadFile(stderr.Name())
		t.Fatalf("start chromium: %v\n%s", err, said)
	}
	return c
}

// end asks Chromium to end, which ends its children too; kills it when it does
// not; and waits for it.
func (c *chromium) end() {
	fmt.Fprintf(c.to, "{\"id\":%d,\"method\":\"Browser.close\"}\x00", 1<<30)
	late := time.AfterFunc(10*time.Second, func() { c.process.Process.Kill() })
	c.process.Wait()
	late.Stop()
	c.to.Close()
	<-c.ended
}

// read hands on what Chromium says; it ends with Chromium.
func (c *chromium) read(from *os.File) {
	defer close(c.ended)
	defer from.Close()
	for r := bufio.NewReader(from); ; {
		line, err := r.ReadBytes(0)
		if err != nil {
			return
		}
		var m devMessage
		if json.Unmarshal(line[:len(line)-1], &m) != nil {
			continue
		}
		c.mu.Lock()
		if call, ok := c.calls[m.ID]; ok {
			delete(c.calls, m.ID)
			call <- m
		} else if p := c.tabs[m.Session]; p != nil {
			if said := complaintOf(m); said != "" {
				p.said = append(p.said, said)
			}
		}
		c.mu.Unlock()
	}
}

// complaintOf is what an event complains about: its source and its text.
func complaintOf(m devMessage) string {
	var p struct {
		Type             string
		Args             []struct{ Value, Description any }
		ExceptionDetails struct {
			Text      string
			Exception struct{ Description string }
		}
		Entry struct{ Source, Level, Text, URL string }
	}
	json.Unmarshal(m.Params, &p)
	switch {
	case m.Method == "Runtime.exceptionThrown":
		return "exception: " + p.ExceptionDetails.Text + " " + p.ExceptionDetails.Exception.Description
	case m.Method == "Runtime.consoleAPICalled" && (p.Type == "error" || p.Type == "warning" || p.Type == "assert"):
		return fmt.Sprintf("console: %v", p.Args)
	case m.Method == "Log.entryAdded" && (p.Entry.Level == "error" || p.Entry.Level == "warning"):
		return p.Entry.Source + ": " + p.Entry.Text + " " + p.Entry.URL
	}
	return ""
}

// call asks Chromium, or the tab of a session, and reads the answer into result.
func (c *chromium) call(session, method string, params, result any) {
	c.t.Helper()
	if err := c.ask(session, method, params, result); err != nil {
		c.t.Fatalf("%s: %v", method, err)
	}
}

func (c *chromium) ask(session, method string, params, result any) error {
	answer := make(chan devMessage, 1)
	c.mu.Lock()
	c.last++
	id := c.last
	c.calls[id] = answer
	c.mu.Unlock()
	message, err := json.Marshal(struct {
		ID      int    `json:"id"`
		Session string `json:"sessionId,omitempty"`
		Method  string `json:"method"`
		Params  any    `json:"params,omitempty"`
	}{id, session, method, params})
	if err != nil {
		return err
	}
	if _, err := c.to.Write(append(message, 0)); err != nil {
		return err
	}
	select {
	case m := <-answer:
		if m.Error != nil {
			return errors.New(m.Error.Message)
		}
		if result == nil {
			return nil
		}
		return json.Unmarshal(m.Result, result)
	case <-c.ended:
		return errors.New("chromium has ended")
	case <-time.After(time.Minute):
		return errors.New("no answer")
	}
}

// open opens a new tab and waits until its page is complete.
func (c *chromium) open(url string) *tab {
	c.t.Helper()
	var target struct{ TargetID string }
	c.call("", "Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	var attached struct{ SessionID string }
	c.call("", "Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &attached)
	p := &tab{c: c, session: attached.SessionID}
	c.mu.Lock()
	c.tabs[p.session] = p
	c.mu.Unlock()
	for _, domain := range []string{"Runtime", "Log", "Page"} {
		p.call(domain+".enable", nil, nil)
	}
	var gone struct{ ErrorText string }
	p.call("Page.navigate", map[string]any{"url": url}, &gone)
	if gone.ErrorText != "" {
		c.t.Fatalf("open %s: %s", url, gone.ErrorText)
	}
	p.await(`location.href !== "about:blank" && document.readyState === "complete"`)
	return p
}

func (p *tab) call(method string, params, result any) {
	p.c.t.Helper()
	p.c.call(p.session, method, params, result)
}

// eval is the value of a JavaScript expression, as encoding/json reads it.
func (p *tab) eval(expression string) any {
	p.c.t.Helper()
	value, err := p.try(expression)
	if err != nil {
		p.c.t.Fatalf("%s: %v", expression, err)
	}
	return value
}

func (p *tab) try(expression string) (any, error) {
	var r struct {
		Result           struct{ Value any }
		ExceptionDetails *struct{ Exception struct{ Description string } }
	}
	err := p.c.ask(p.session, "Runtime.evaluate", map[string]any{"expression": expression, "returnByValue": true, "awaitPromise": true}, &r)
	if err == nil && r.ExceptionDetails != nil {
		err = errors.New(r.ExceptionDetails.Exception.Description)
	}
	return r.Result.Value, err
}

// await waits until a JavaScript expression is true. An exception is not yet
// true: the page may be under way.
func (p *tab) await(expression string) {
	p.c.t.Helper()
	var err error
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		var value any
		if value, err = p.try(expression); value == true {
			return
		}
	}
	text, _ := p.try(`document.body.innerText.slice(0, 1000)`)
	p.c.t.Fatalf("never true: %s (%v)\ncomplaints: %q\npage:\n%v", expression, err, p.complaints(), text)
}

// complaints are the errors and warnings so far, each after its source:
// exception, console, security (the policy), network, …
func (p *tab) complaints(except ...string) (list []string) {
	p.c.mu.Lock()
	defer p.c.mu.Unlock()
next:
	for _, said := range p.said {
		for _, source := range except {
			if strings.HasPrefix(said, source+": ") {
				continue next
			}
		}
		list = append(list, said)
	}
	return list
}

// look sets the width and height of the page in CSS pixels, and "light" or "dark".
func (p *tab) look(width, height int, scheme string) {
	p.c.t.Helper()
	p.call("Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}, nil)
	p.call("Emulation.setEmulatedMedia", map[string]any{"features": []map[string]string{{"name": "prefers-color-scheme", "value": scheme}}}, nil)
}
