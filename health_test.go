package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
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

// TestHealthRoutes is the route table: a probe is 200 or 503 with the reason, soon
// although a check hangs, and nothing but GET and HEAD asks.
func TestHealthRoutes(t *testing.T) {
	hangs := func(ctx context.Context) error {
		<-ctx.Done()
		return errors.New("hangs")
	}
	const text, json = "text/plain; charset=utf-8", "application/json"
	for _, tt := range []struct {
		request     string
		live, ready func(context.Context) error
		after       time.Duration
		status      int
		body, kind  string
	}{
		{"GET /live", fine, broken, 0, 200, "ok\n", text},
		{"GET /live", broken, fine, 0, 503, "hub: bus is down\n", text},
		{"GET /live", hangs, fine, checkTimeout, 503, "hub: hangs\n", text},
		{"GET /ready", hangs, fine, 0, 200, "ok\n", text},
		{"GET /ready", fine, broken, 0, 503, "redis: bus is down\n", text},
		{"GET /ready", fine, hangs, checkTimeout, 503, "redis: hangs\n", text},
		{"HEAD /ready", fine, broken, 0, 503, "", text},
		{"GET /health", fine, fine, 0, 200, `"live":"ok","ready":"ok","role":"server","status":"ok"}` + "\n", json},
		{"GET /health", fine, broken, 0, 503, `"live":"ok","ready":"redis: bus is down","role":"server","status":"failing"}` + "\n", json},
		{"GET /health", hangs, hangs, checkTimeout, 503, `"live":"hub: hangs","ready":"redis: hangs","role":"server","status":"failing"}` + "\n", json},
		{"GET /metrics", hangs, hangs, 0, 200, "\ngo_memstats_sys_bytes", "text/plain; version=0.0.4; charset=utf-8"},
		{"GET /", hangs, hangs, 0, 200, "<!doctype html>", "text/html; charset=utf-8"},
		{"GET /status", hangs, hangs, 0, 200, `"server":{"streams":0}`, json},
		{"GET /live/", fine, fine, 0, 404, "404 page not found\n", text},
		{"GET /subscribe/ci", fine, fine, 0, 404, "404 page not found\n", text},
		{"POST /ready", fine, fine, 0, 405, "method not allowed\n", text},
		{"DELETE /nothing", fine, fine, 0, 405, "method not allowed\n", text},
	} {
		inBubble(t, func(t *testing.T) {
			p, begin := newPipes(), time.Now()
			serveOn(t, &http.Server{Handler: reportOn(tt.live, tt.ready)}, p)
			method, path, _ := strings.Cut(tt.request, " ")
			r := post(t.Context(), p.transport(t, false), method, "http://relay.test"+path, "")
			if r.status != tt.status || r.at.Sub(begin) != tt.after || !strings.Contains(r.body, tt.body) || tt.body == "" && r.body != "" ||
				r.header.Get("Content-Type") != tt.kind || (r.header.Get("Allow") == "GET, HEAD") != (r.status == 405) {
				t.Errorf("%s: got %+v after %s", tt.request, r, r.at.Sub(begin))
			}
		})
	}
}

// TestSinceWhen: /health and the page tell since when a check holds or does not,
// although nobody asked when that changed, and what its last error was.
func TestSinceWhen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var down atomic.Bool
		h := reportOn(fine, func(ctx context.Context) error {
			if down.Load() {
				return broken(ctx)
			}
			return nil
		})
		running(t, h.Run)
		synctest.Wait()
		check := func(ok bool, since time.Time, said string, at *time.Time) {
			t.Helper()
			want := must(json.Marshal(verdict{"redis", "ready", ok, since, said, at}))
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequest("GET", "/health", nil))
			if !strings.Contains(w.Body.String(), string(want)) {
				t.Errorf("no %s in %s", want, w.Body)
			}
		}
		begin := time.Now()
		check(true, begin, "", nil)
		time.Sleep(time.Minute + checkInterval/2)
		down.Store(true)
		time.Sleep(time.Minute)
		last := time.Now() // somebody asks
		check(false, begin.Add(time.Minute+checkInterval), "bus is down", &last)
		down.Store(false)
		time.Sleep(time.Minute)
		check(true, last.Add(checkInterval/2), "bus is down", &last)
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
	for i, n := range slices.Backward(numbers) {
		if j.Put(n, -i) != n {
			t.Errorf("entry %d has another number now", n)
		}
	}
	for i, entry := range j.latest().([]int) {
		if want := i + 1 - 3*journalSize; entry != want {
			t.Fatalf("entry %d is %v, want %d", i, entry, want)
		}
	}
}

// TestSeries: each point tells of ten seconds, the oldest of those ten minutes ago;
// quantiles are near.
func TestSeries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j Journal[int]
		time.Sleep(seriesStep*time.Second - time.Duration(time.Now().UnixNano()%int64(seriesStep*time.Second)))
		ended, failed := make([]int, seriesSize), make([]int, seriesSize)
		for point := range 2*seriesSize + 7 {
			for i := range point {
				took := 4 * time.Millisecond
				if i == 0 {
					took = 2 * time.Second
				}
				j.Count(took, i%10 == 0)
			}
			time.Sleep(seriesStep * time.Second)
			ended, failed = append(ended[1:], point), append(failed[1:], (point+9)/10)
			s := j.series(time.Now())
			if !slices.Equal(s.Webhooks, ended) || !slices.Equal(s.Failures, failed) || len(s.P50) != seriesSize || s.Until%seriesStep != 0 || s.Until != time.Now().Unix() {
				t.Fatalf("point %d: %+v, want %d and %d", point, s, ended, failed)
			}
			for i, n := range ended {
				if (s.P50[i] == nil) != (n == 0) || n > 2 && (*s.P50[i] < 3 || *s.P50[i] > 5 || n < 100 && (*s.P99[i] < 1700 || *s.P99[i] > 2400)) {
					t.Fatalf("at point %d, of %d: p50 %v, p99 %v", point, n, s.P50[i], s.P99[i])
				}
			}
		}
		time.Sleep(time.Hour)
		if s := j.series(time.Now()); !slices.Equal(s.Webhooks, make([]int, seriesSize)) {
			t.Errorf("%d an hour later", s.Webhooks)
		}
	})
}

// TestEventsOfPage: a page is sent the document at once, within half a second when
// something has changed, and now and then otherwise; there is space for a few.
func TestEventsOfPage(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		p, h := newPipes(), reportOn(fine, fine)
		serveOn(t, &http.Server{Handler: h}, p)
		rt := p.transport(t, false)
		const events = "http://relay.test/events"
		l, begin := listen(t, rt, events), time.Now()
		shows := func(n int, when time.Duration, webhooks ...Passage) {
			t.Helper()
			var doc struct {
				Now      time.Time
				Webhooks []Passage
			}
			e := l.next(t, n)
			err := json.Unmarshal([]byte(e.data), &doc)
			if err != nil || !doc.Now.Equal(e.at) || e.at.Sub(begin) != when || !slices.Equal(doc.Webhooks, webhooks) {
				t.Errorf("%v: after %s came %s", err, e.at.Sub(begin), e.data)
			}
		}
		shows(1, 0)
		one := Passage{Event: "one", Path: "/webhooks/ci/<b>"}
		h.Journal.(*Journal[Passage]).Put(0, one)
		shows(2, viewInterval, one)
		shows(3, viewInterval+viewLonely, one)
		if kind := l.resp.Header.Get("Content-Type"); kind != "text/event-stream" {
			t.Errorf("content type %q", kind)
		}
		for range viewersLimit - 1 {
			listen(t, rt, events)
		}
		if r := post(t.Context(), rt, "GET", events, ""); r.status != 503 {
			t.Errorf("one too many: %+v", r)
		}
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
	const bucket = "relay_d_seconds_bucket{le=\""
	between := strings.Fields("0.0025 0.005 0.01 0.025 0.05 0.1 0.25 0.5 1 2.5 5 10 30")
	want := `# HELP relay_a_total Things.
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
` + bucket + strings.Join(between, "\"} 3\n"+bucket) + `"} 3
relay_d_seconds_bucket{le="60"} 4
relay_d_seconds_bucket{le="+Inf"} 5
relay_d_seconds_sum 3660.002001
relay_d_seconds_count 5
# HELP process_`
	if got := h.exposition(); !strings.HasPrefix(got, want) {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

var (
	sampleLine = regexp.MustCompile(`^([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\]|\\[\\"n])*",?)+)\})? (\S+)$`)
	familyName = regexp.MustCompile(`^(relay|process|go)_[a-z_]+$`)
	badUnit    = regexp.MustCompile(`_(ms|milliseconds|microseconds|nanoseconds|minutes|hours|days|kb|mb|kilobytes|megabytes|bits|percent)(_|$)`)
)

// TestMetrics holds what both roles expose to the rules of Prometheus' parsers and
// of promtool's lint
// (https://prometheus.io/docs/instrumenting/exposition_formats/,
// https://prometheus.io/docs/practices/naming/,
// https://prometheus.io/docs/specs/om/open_metrics_spec/): every family and every
// sample is there once; names have their unit and say what they count; no family
// takes the name of another one's samples.
func TestMetrics(t *testing.T) {
	suffixes := map[string][]string{"counter": {""}, "gauge": {""}, "summary": {"", "_sum", "_count"}, "histogram": {"_bucket", "_sum", "_count"}}
	roles := programMetrics()
	const source, target = "http://relay.test/subscribe/", "http://target.test"
	roles["client"] = clientMetrics([]*Client{newClientOf(t, source+"a", target), newClientOf(t, source+"b", target)})
	for role, metrics := range roles {
		taken := map[string]bool{}
		for _, m := range slices.Concat(metrics, processMetrics) {
			base, total := strings.CutSuffix(m.Name, "_total")
			if total != (m.Kind == "counter") || m.Kind == "histogram" && !strings.HasSuffix(m.Name, "_seconds") ||
				!familyName.MatchString(m.Name) || badUnit.MatchString(m.Name) || !strings.HasSuffix(m.Help, ".") || strings.Contains(m.Help, "\n") {
				t.Errorf("%s: %s is a %s: %q", role, m.Name, m.Kind, m.Help)
			}
			if strings.HasPrefix(m.Name, "go_memstats_") {
				base = m.Name // as Prometheus' own client has it
			}
			if taken["family "+base] {
				t.Errorf("%s: %s and another one are one family in OpenMetrics", role, m.Name)
			}
			taken["family "+base] = true
			m.Collect(func(suffix, labels string, value float64) {
				sample := strings.TrimSuffix(m.Name+suffix+"{"+labels+"}", "{}")
				if taken[sample] || !slices.Contains(suffixes[m.Kind], suffix) || !sampleLine.MatchString(sample+" 1") {
					t.Errorf("%s: %s has the sample %s", role, m.Name, sample)
				}
				taken[sample] = true
			})
		}
	}
}

// TestMetricsOfHeld: a webhook that was held is counted once it has its answer, with
// the time that took, and every heartbeat of every stream is.
func TestMetricsOfHeld(t *testing.T) {
	rigTest(t, []string{"RESPONSE_MODE=status", "SERVER_HEARTBEAT_INTERVAL=2s"}, func(t *testing.T, p *pipes, r *rig) {
		rt := p.transport(t, false)
		check := func(when string, answered int) {
			t.Helper()
			synctest.Wait()
			text := (&Health{Metrics: serverMetrics(r.Server, r.hub, nil, &door{})}).exposition()
			for _, want := range []string{`relay_webhooks_total{outcome="answered",reason=""} %d`, "relay_webhook_answer_seconds_count %d"} {
				if want = fmt.Sprintf(want, answered); !strings.Contains(text, "\n"+want+"\n") || !strings.Contains(text, "\nrelay_heartbeats_total 4\n") {
					t.Errorf("%s: no %q, or not 4 heartbeats, in\n%s", when, want, text)
				}
			}
		}
		if got := post(t.Context(), rt, "POST", hooksURL, "x"); got.status != 503 { // nobody came; it is not answered
			t.Errorf("answer %+v, want 503", got)
		}
		l, _ := listen(t, rt, streamURL, features...), listen(t, rt, streamURL, features...)
		time.Sleep(5 * time.Second) // two heartbeats of each
		told := make(chan outcome, 1)
		go func() { told <- post(t.Context(), rt, "POST", hooksURL, "x") }()
		id := l.next(t, 1).id
		check("held", 0)
		l.report(t, rt, id, Answer{Status: 200})
		if got := <-told; got.status != 200 {
			t.Errorf("answer %+v, want 200", got)
		}
		check("answered", 1)
	})
}

// TestProbesComeThrough: connections to the health port that are only there do
// not keep a probe out, and none stays after its answer.
func TestProbesComeThrough(t *testing.T) {
	t.Parallel()
	server := startServer(t, probed...)
	var open atomic.Int64
	for range probeConnections + 50 {
		conn := connect(t, server.health)
		open.Add(1)
		go func() { // ends with the connection
			conn.Read(make([]byte, 1))
			open.Add(-1)
		}()
	}
	half := connect(t, server.health)
	io.WriteString(half, "GET /live HTTP/1.1\r\nHost: x\r\n") // a header without an end
	for range 20 {
		for _, page := range []string{"/live", "/ready", "/health", "/metrics"} {
			answer := exchange(t, server.health, "GET "+page+" HTTP/1.1\r\nHost: x\r\n\r\n") // to its end
			if !strings.HasPrefix(answer, "HTTP/1.1 200 OK\r\n") || !strings.Contains(answer, "\r\nConnection: close\r\n") {
				t.Fatalf("%s: %.200q", page, answer)
			}
		}
	}
	eventually(t, "one address has half of the connections at most", func() bool { return open.Load() <= probeConnections/2 })
	half.SetReadDeadline(time.Now().Add(patience))
	begin := time.Now()
	if _, err := io.ReadAll(half); errors.Is(err, os.ErrDeadlineExceeded) || time.Since(begin) > probeTime+slack {
		t.Errorf("a header without an end is waited for: %v after %s", err, time.Since(begin))
	}
}

// The page, in a browser.

// TestPage: the page of both roles loads without a complaint, shows a webhook as
// it comes, outlives a restart, and takes nothing that strangers choose for
// markup.
func TestPage(t *testing.T) {
	t.Parallel()
	c := startChromium(t)
	env := []string{
		fmt.Sprintf("HEALTH_SERVICE_PORT=%d", freePorts(t, 1)[0]), "HEALTH_SERVICE_SHUTDOWN_DELAY=0", "HEALTH_SERVICE_SHUTDOWN_HANDLER_TIMEOUT=1s",
		"RESPONSE_MODE=slow=status", "RESPONSE_TIMEOUT=2m",
	}
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
	ours, theirs := c.open("http://"+server.health+"/"), c.open("http://"+client.health+"/")
	ours.holds("server", "No webhooks yet", "ci")
	theirs.holds("client", "No webhooks yet", "ci")
	send(t, "POST", "http://"+server.addr+"/webhooks/ci/first?hunter2=1", "hunter2", "X-Secret", "hunter2")
	ours.holds("/webhooks/ci/first", "accepted")
	theirs.holds("/webhooks/ci/first", "forwarded")
	answered := postHeld(t, server, "slow", "one")
	ours.holds("held")
	theirs.holds("forwarding")
	release <- says(201, "")
	expectAnswer(t, answered, 201)
	ours.holds("answered")

	const markup = `<img/src=x/onerror="document.title='owned'">`
	for _, target := range []string{"/webhooks/ci/" + markup, "/webhooks/" + markup, "/webhooks/<img onerror>"} {
		wire(t, server.addr, compose("POST "+target+" HTTP/1.1", ""))
	}
	ours.holds("/webhooks/ci/"+markup, "/webhooks/<img/src")
	theirs.holds("/webhooks/ci/" + markup)
	for _, p := range []*tab{ours, theirs} {
		p.await("document.querySelectorAll('img, iframe, object, embed').length === 0 && !document.title.includes('owned')")
		p.await("!document.documentElement.outerHTML.includes('hunter2')")
		for _, width := range []int{320, 1280} {
			p.call("Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}, nil)
			p.await("document.documentElement.scrollWidth <= innerWidth") // nothing beside the page
		}
	}
	if len(c.complaints) > 0 {
		t.Errorf("%q", c.complaints)
	}

	if err := server.stop(); err != nil {
		t.Error(err)
	}
	ours.holds("disconnected")
	theirs.holds("failing")
	again := startServer(t, env...)
	ours.await("!document.body.innerText.includes('disconnected')")
	ours.holds("No webhooks yet")
	postAccepted(t, again, "ci", "second")
	ours.holds("/webhooks/ci/second")
	for _, said := range c.complaints {
		if !strings.HasPrefix(said, "network ") { // that nobody was there is no fault of the page
			t.Error(said)
		}
	}
}

// chromium is a headless Chromium that a test drives: its DevTools protocol,
// JSON messages that each end with a NUL, over two pipes. No port is opened.
type chromium struct {
	t          testing.TB
	to, from   *os.File // its fds 3 and 4
	in         *bufio.Reader
	last       int      // id of the last call
	complaints []string // errors and warnings so far, each behind its source: network, security (the policy), …; of exceptions and the console there is none
}

type tab struct {
	*chromium
	session string // empty: Chromium itself
}

// startChromium starts Chromium and ends it, and with it its children, with the test.
func startChromium(t testing.TB) *chromium {
	t.Helper()
	path := need(t, "chromium", "chromium")
	// Not t.TempDir: what Chromium started may still write there for a moment
	// after it has ended, and t.TempDir would fail the test for that.
	profile := must(os.MkdirTemp("", "chromium"))
	itsIn, to, err := os.Pipe()
	from, itsOut, err2 := os.Pipe()
	if err := errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	var stderr logBuffer
	process := exec.CommandContext(t.Context(), path, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
		"--user-data-dir="+profile, "--remote-debugging-pipe")
	process.ExtraFiles, process.Stderr = []*os.File{itsIn, itsOut}, &stderr
	process.Cancel = func() error {
		_, err := io.WriteString(to, "{\"id\":1073741824,\"method\":\"Browser.close\"}\x00")
		return err
	}
	process.WaitDelay = 10 * time.Second // then it is killed
	err = process.Start()
	itsIn.Close()
	itsOut.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		process.Wait()
		to.Close()
		from.Close()
		inTime(func() bool { return os.RemoveAll(profile) == nil })
		if t.Failed() {
			t.Logf("chromium said\n%s", stderr.String())
		}
	})
	return &chromium{t: t, to: to, from: from, in: bufio.NewReader(from)}
}

// open opens a new tab and waits until its page is complete.
func (c *chromium) open(url string) *tab {
	c.t.Helper()
	itself := &tab{c, ""}
	var target struct{ TargetID, SessionID string }
	itself.call("Target.createTarget", map[string]any{"url": "about:blank"}, &target)
	itself.call("Target.attachToTarget", map[string]any{"targetId": target.TargetID, "flatten": true}, &target)
	p := &tab{c, target.SessionID}
	for _, domain := range []string{"Runtime", "Log", "Page"} {
		p.call(domain+".enable", nil, nil)
	}
	p.call("Page.navigate", map[string]any{"url": url}, nil)
	p.await(`location.href !== "about:blank" && document.readyState === "complete"`)
	return p
}

// call asks the tab and reads the answer into result, and before it what tabs
// complain about.
func (p *tab) call(method string, params map[string]any, result any) {
	p.t.Helper()
	p.last++
	message := must(json.Marshal(struct {
		ID      int            `json:"id"`
		Session string         `json:"sessionId,omitempty"`
		Method  string         `json:"method"`
		Params  map[string]any `json:"params,omitempty"`
	}{p.last, p.session, method, params}))
	p.to.Write(append(message, 0))
	p.from.SetReadDeadline(time.Now().Add(patience))
	for {
		var m struct { // the answer to a call, or an event of a tab
			ID             int
			Params, Result json.RawMessage
			Error          *struct{ Message string }
		}
		line, err := p.in.ReadBytes(0)
		if err == nil {
			err = json.Unmarshal(line[:len(line)-1], &m)
		}
		if err != nil {
			p.t.Fatalf("%s: %v", method, err)
		}
		if m.ID != p.last {
			p.hear(m.Params)
			continue
		}
		if m.Error != nil {
			p.t.Fatalf("%s: %s", method, m.Error.Message)
		}
		if result != nil {
			json.Unmarshal(m.Result, result)
		}
		return
	}
}

// hear keeps the parameters of an event if that complains.
func (c *chromium) hear(params json.RawMessage) {
	var e struct {
		Type             string // of what was written to the console
		Entry            struct{ Source, Level string }
		ExceptionDetails any
	}
	json.Unmarshal(params, &e)
	if e.ExceptionDetails != nil || slices.Contains([]string{"error", "warning", "assert"}, cmp.Or(e.Entry.Level, e.Type)) {
		c.complaints = append(c.complaints, e.Entry.Source+" "+string(params))
	}
}

// value is that of a JavaScript expression, as encoding/json reads it; of an
// exception, what it is.
func (p *tab) value(expression string) any {
	p.t.Helper()
	var r struct {
		Result struct{ Value, Description any }
	}
	p.call("Runtime.evaluate", map[string]any{"expression": expression, "returnByValue": true}, &r)
	return cmp.Or(r.Result.Value, r.Result.Description)
}

// await waits until a JavaScript expression is true. An exception is not yet
// true: the page may be under way.
func (p *tab) await(expression string) {
	p.t.Helper()
	if !inTime(func() bool { return p.value(expression) == true }) {
		p.t.Fatalf("never true: %s\ncomplaints: %q\npage:\n%v", expression, p.complaints, p.value("document.body.innerText.slice(0, 1000)"))
	}
}

// holds waits until the page shows all texts.
func (p *tab) holds(texts ...string) {
	p.t.Helper()
	for _, text := range texts {
		p.await(fmt.Sprintf("document.body.innerText.includes(%q)", text))
	}
}
