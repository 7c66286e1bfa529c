package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	mathrand "math/rand/v2"
	"net/http"
	"net/netip"
	"net/textproto"
	"net/url"
	"path"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
	"unicode/utf8"
)

// onlyMessage is the one event of a frame, a webhook in one of its two forms.
func onlyMessage(t testing.TB, frame []byte) message {
	t.Helper()
	events, err := parsed(bytes.NewReader(frame))
	if err != io.EOF || len(events) != 1 || events[0].name != "message" && events[0].name != "webhook" {
		t.Fatalf("frame %q is no webhook: %s%v", frame, formed(events), err)
	}
	return events[0]
}

// ownChannel finds the channel in a webhook in either form, as servers send it.
var ownChannel = regexp.MustCompile(`(?:^\S+ |"originalUrl":")/webhooks/([\w.~-]+)`)

// decodeOwn reads a webhook in either form, as a client of the very channel of
// the event does. Where the legacy form tells no id, that of the block stands.
func decodeOwn(name, id string, data []byte) (*Webhook, error) {
	var channel string
	if m := ownChannel.FindSubmatch(data); m != nil {
		channel = string(m[1])
	}
	if name == "webhook" {
		return decodeWebhook(channel, id, data)
	}
	w, err := decodeLegacy(channel, data)
	if err == nil {
		w.ID = id
	}
	return w, err
}

// frameOf is the block of e, without the chunk around it.
func frameOf(e *Event) string { return string(block(e.chunk)) }

// httpBlock is a webhook event as another source might send it: under id, with a
// head of whole lines, to which its length is added.
func httpBlock(id, head, body string) string {
	data := head + "Content-Length: " + strconv.Itoa(len(body)) + "\n\n" + body
	return "id: " + id + "\nevent: webhook\ndata: " + strings.ReplaceAll(data, "\n", "\ndata: ") + "\n\n"
}

// readyFrame is the block that begins a stream.
func readyFrame(heartbeat time.Duration) string { return frameOf(readyEvent(heartbeat)) }

// legacyFrame is the block of e for readers that announce nothing.
func legacyFrame(e *Event) string { return string(block(e.chunkFor(false))) }

// sameWebhook compares every byte that the target could tell apart.
func sameWebhook(t testing.TB, got, want *Webhook) {
	t.Helper()
	all := func(w Webhook) string {
		w.Scheme = "" // of the hop
		return fmt.Sprintf("%q", w)
	}
	if got, want := all(*got), all(*want); got != want {
		t.Fatalf("decoded\n%s, want\n%s", got, want)
	}
}

var wireTime = time.UnixMilli(1700000000000)

// TestWire holds both forms of webhooks on the stream to the letter, since clients
// of another make and version read them.
func TestWire(t *testing.T) {
	check := func(w *Webhook, http, legacy string) {
		t.Helper()
		w.ID, w.Time, w.Timeout = "r-1", wireTime, 9*time.Second
		e := eventOf("ci", w)
		frame := "id: r-1\nevent: webhook\ndata: " + strings.Replace(strings.ReplaceAll(http, "\n", "\ndata: "), "\ndata: \n", "\ndata:\n", 1) + "\n\n"
		if want := fmt.Sprintf("%08x\r\n%s\r\n", len(frame), frame); string(e.chunk) != want || e.ID != "r-1" || e.Channel != "ci" || e.Mode != w.Mode || e.Only != "" {
			t.Errorf("%+v has the chunk\n%q, want\n%q", e, e.chunk, want)
		}
		first, want := e.chunkFor(false), "id: r-1\ndata: "+legacy+`,"timestamp":1700000000000}`+"\n\n"
		if string(block(first)) != want || &e.chunkFor(false)[0] != &first[0] { // it is made once
			t.Errorf("frame\n%q, want\n%q", block(first), want)
		}
		if over, err := openEvent("ci", e.repeat(testReplica, 2, "s").message()); err != nil || legacyFrame(over) != want {
			t.Errorf("another replica makes %q, %v", legacyFrame(over), err)
		}
	}
	const coded, plain = "X-Relay-Body: base64\nContent-Length: 4\n", "/webhooks/ci/p"
	for _, tc := range []struct {
		headers, body  string
		head, text     string // of the HTTP form
		fields, member string // of the legacy form
	}{
		{"", "", "Content-Length: 0\n", "", `"content-length":"0"`, `"body":""`},
		{"B: 1\nHost: h:1", "{}", "B: 1\nHost: h:1\nContent-Length: 2\n", "{}", `"b":"1","content-length":"2","host":"h:1"`, `"body":"{}"`},
		{"A: caf\xe9 \x80\xff\t.", "", "A: caf\u00e9 \u0080\u00ff\t.\nContent-Length: 0\n", "", "\"a\":\"caf\u00e9 \u0080\u00ff\\t.\",\"content-length\":\"0\"", `"body":""`},
		{"A: 1\nA: 2\nA: 1", "", "A: 1\nA: 2\nA: 1\nContent-Length: 0\n", "", `"a":["1","2","1"],"content-length":"0"`, `"body":""`},
		{"A:", "", "A: \nContent-Length: 0\n", "", `"a":"","content-length":"0"`, `"body":""`},
		{"Set-Cookie: a=b", "", "Set-Cookie: a=b\nContent-Length: 0\n", "", `"content-length":"0","set-cookie":["a=b"]`, `"body":""`}, // always an array
		{"", "a\n\nb\n", "Content-Length: 5\n", "a\n\nb\n", `"content-length":"5"`, `"body":"a\n\nb\n"`},
		{"", "\n", "Content-Length: 1\n", "\n", `"content-length":"1"`, `"body":"\n"`},
		{"", "\u2028\x00\"\\\t\x1f\u00e9<&>: \ufeff", "Content-Length: 18\n", "\u2028\x00\"\\\t\x1f\u00e9<&>: \ufeff", `"content-length":"18"`,
			`"body":"\u2028\u0000\"\\\t\u001f` + "\u00e9<&>: \ufeff\""},
		{"", "a\r\n", coded, "YQ0K", `"content-length":"3"`, `"body":"a\r\n"`},
		{"A: b", "\xff\x00\xfe", "A: b\n" + coded, "/wD+", `"a":"b"`, `"bodyBase64":"/wD+"`},
		{"", "\xed\xa0\x80", coded, "7aCA", ``, `"bodyBase64":"7aCA"`}, // surrogates are not UTF-8
	} {
		check(&Webhook{Method: "POST", Path: plain, Headers: endToEnd(headersOf(tc.headers)), Body: []byte(tc.body), Mode: modeAccept},
			"POST /webhooks/ci/p HTTP/1.1\n"+tc.head+"X-Relay-Time: 1700000000000\nX-Relay-Respond: accept\n\n"+tc.text,
			`{"headers":{`+tc.fields+`},"originalUrl":"/webhooks/ci/p","path":"/webhooks/ci/p","query":{},`+tc.member)
	}
	for _, tc := range []struct{ mode, respond, path, query, target, legacy string }{
		{modeAccept, "accept", "/webhooks/ci/\xe9%2F", "?\xff=\xe9", "/webhooks/ci/\u00e9%2F?\u00ff=\u00e9", "{\"\u00ff\":\"\u00e9\"}"},
		{modeAccept, "accept", plain, "?x=1;y=2&s=%zz&e=%ff&a+b=%C3%A9+c", plain + "?x=1;y=2&s=%zz&e=%ff&a+b=%C3%A9+c", `{"a b":"é c","e":"%ff","s":"%zz","x":"1;y=2"}`},
		{modeStatus, "status; timeout=9000", plain, "?labels=bug;urgent&n=1", plain + "?labels=bug;urgent&n=1", `{"labels":"bug;urgent","n":"1"}`},
		{modeResponse, "response; timeout=9000", plain, "?b=2&a=1&b=3&c&&d=x=y&b=4", plain + "?b=2&a=1&b=3&c&&d=x=y&b=4", `{"a":"1","b":["2","3","4"],"c":"","d":"x=y"}`},
	} {
		path, _, _ := strings.Cut(tc.target, "?")
		check(&Webhook{Method: "PURGE", Path: tc.path, Query: tc.query, Mode: tc.mode},
			"PURGE "+tc.target+" HTTP/1.1\nContent-Length: 0\nX-Relay-Time: 1700000000000\nX-Relay-Respond: "+tc.respond+"\n\n",
			`{"headers":{"content-length":"0"},"originalUrl":"`+tc.target+`","path":"`+path+`","query":`+tc.legacy+`,"body":""`)
	}
	if legacyFrame(heartbeatEvent) != frameOf(heartbeatEvent) {
		t.Error("the relay's own events have one form")
	}
}

// headersOf reads "name: value" lines as a server captures them: names are
// tokens in canonical form, values are any bytes without LF.
func headersOf(lines string) map[string][]string {
	h := map[string][]string{}
	for line := range strings.SplitSeq(lines, "\n") {
		name, value, _ := strings.Cut(line, ":")
		if isToken(name) {
			name = textproto.CanonicalMIMEHeaderKey(name)
			h[name] = append(h[name], strings.TrimSpace(value))
		}
	}
	return h
}

func eventOf(channel string, w *Webhook) *Event {
	e, _ := newEvent(channel, testReplica, w, nil)
	return e
}

// byAnybody reads a webhook as a program does that knows nothing of ours, with
// net/http: bytes above 0x7F that the head has are code points there.
func byAnybody(t testing.TB, m message) *Webhook {
	t.Helper()
	head, body, _ := strings.Cut(string(m.data), "\n\n")
	plain, ok := latin1(head)
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(plain + "\n\n" + body)))
	if err != nil || !ok {
		t.Fatalf("%q: %v", m.data, err)
	}
	w := &Webhook{ID: m.id, Method: r.Method, Body: must(io.ReadAll(r.Body))}
	if r.Header.Get("X-Relay-Body") == "base64" {
		w.Body = must(base64.StdEncoding.DecodeString(string(w.Body)))
	}
	if r.Host != "" {
		r.Header["Host"] = []string{r.Host}
	}
	w.Path, w.Query, _ = strings.Cut(r.RequestURI, "?")
	w.Query, w.Headers = r.RequestURI[len(w.Path):], endToEnd(r.Header)
	return w
}

// payloads are bodies as they come, and as nobody should send them.
func payloads() [][]byte {
	return [][]byte{
		nil, []byte("{}"), githubBody(10 << 10), []byte(everyByte), []byte(everyByte[:0x80]), []byte("payload=%7B%7D&b=x+y"),
		[]byte("\n"), []byte("\n\n\n"), []byte("a\n"), []byte("\na"), []byte("\r"), []byte("a\r\nb"), []byte("\ufeff{}"), []byte("data: x\n\nevent: ready\ndata: {}\n\n"),
		[]byte("POST / HTTP/1.1\n\n"), bytes.Repeat([]byte("\n"), 17<<10), bytes.Repeat([]byte("\n"), 40<<10), bytes.Repeat([]byte{1}, 17<<10), []byte("\u2028\x7f\x00"),
	}
}

// FuzzWebhook states what the wire is for: what a server captured arrives,
// byte for byte, on the first delivery, on every later one, and over another
// replica; to our client, and to whoever reads by the book.
func FuzzWebhook(f *testing.F) {
	f.Add("POST", "/webhooks/ci/p?x=1;y=2&sig=%zz", "x-dup: one\nx-dup: two\nset-cookie: a\nauthorization: Bearer x", []byte(`{"a":"\u2028 é"}`), uint8(2), int64(9000), uint64(1))
	f.Add("PATCH", "/webhooks/x//y%2Fz/\xe9?", "x-bytes: \x80\xff\t!", []byte("\x00\r\n\xff"), uint8(1), int64(-1), uint64(2))
	f.Add("delete", "/webhooks/x/../y", "connection: x-a\nx-a: gone\nx-relay-event-id: forged\ncontent-length: 7", []byte(nil), uint8(0), int64(math.MaxInt64), uint64(3))
	f.Add("G ET", "http://evil/a b?c d", "a: \x00", []byte("\u2028\x7f"), uint8(0), int64(0), uint64(4))
	f.Add("PUT", "/webhooks/ci", "host: a\nx-empty:\npragma: no-cache\nx-all: "+everyByte[0x80:], []byte("x"), uint8(0), int64(0), uint64(5))
	f.Add("POST", "/webhooks/ci", "", []byte("x"), uint8(2), int64(math.MaxInt64), uint64(6))
	f.Add(strings.Repeat("m", 2000), "/webhooks/ci", "", []byte("x"), uint8(0), int64(0), uint64(7))
	for i, body := range payloads() {
		f.Add("POST", "/webhooks/ci", "content-type: application/json\nhost: relay.example.com", body, uint8(i), int64(i), uint64(i))
	}
	f.Fuzz(func(t *testing.T, method, raw, lines string, body []byte, mode uint8, ms int64, seed uint64) {
		w := &Webhook{
			ID: newID(testReplica), Method: method, Headers: endToEnd(headersOf(lines)), Body: body, Time: wireTime,
			Mode: []string{modeAccept, modeStatus, modeResponse}[mode%3], Timeout: time.Duration(ms),
		}
		to, err := parseTarget(raw)
		if err != nil || to.webhook() != nil || !isToken(method) || checkHeaders(w.Headers) != nil || len(lines)+len(raw) > 16<<10 {
			t.Skip("no server takes such a request")
		}
		w.Path, w.Query = to.Path, to.Query
		e := eventOf(to.Channel, w)
		if len(e.wire) > w.wireSize(isText(w.Body))+len(to.Channel) {
			t.Fatalf("%d bytes on the wire, %d foreseen", len(e.wire), w.wireSize(isText(w.Body)))
		}
		frame := frameOf(e)
		over, err := openEvent(to.Channel, e.repeat("other", 7, "client").message())
		first, err2 := openEvent(to.Channel, e.wire)
		if err != nil || err2 != nil || frameOf(over) != frame || frameOf(first) != frame || frameOf(e) != frame {
			t.Fatalf("events over a replica: %v, %v, %+v and %+v, want %q", err, err2, first, over, frame)
		}
		got := fmt.Sprint(first.Holder, first.Round, first.Only, first.Mode, over.Holder, over.Round, over.Only, over.Mode)
		if want := fmt.Sprint(testReplica, 1, "", w.Mode, "other", 7, "client", w.Mode); got != want {
			t.Fatalf("events over a replica: %s, want %s", got, want)
		}
		if _, err := openEvent(to.Channel+"x", e.wire); err == nil {
			t.Fatal("an event of another channel is taken")
		}

		want := *w
		if want.Timeout = 0; respond(w.Mode) {
			want.Timeout = min(max(w.Timeout.Truncate(time.Millisecond), 0), maxResponseTimeout)
		}
		whole, err := parsed(&choppy{[]byte(frame), mathrand.New(mathrand.NewPCG(seed, 0))})
		if err != io.EOF || len(whole) != 1 || formed(whole) != formed(byTheBook([]byte(frame))) {
			t.Fatalf("in pieces:\n%s(%v)", formed(whole), err)
		}
		decoded, err := decodeWebhook(to.Channel, whole[0].id, whole[0].data)
		if err != nil {
			t.Fatalf("decode %q: %v", whole[0].data, err)
		}
		sameWebhook(t, decoded, &want)
		if !slices.ContainsFunc(w.Headers, func(h Header) bool {
			return h.Name == "Pragma" || h.Name == "Host" && (len(h.Values) > 1 || h.Values[0] == "")
		}) { // net/http adds to Pragma, and keeps one Host
			anybody := byAnybody(t, whole[0])
			anybody.Time, anybody.Mode, anybody.Timeout = want.Time, want.Mode, want.Timeout
			sameWebhook(t, anybody, &want)
		}

		// The legacy form, for what it can tell.
		legacy := onlyMessage(t, block(e.chunkFor(false)))
		if legacy.name != "message" || legacy.id != w.ID || !json.Valid(legacy.data) {
			t.Fatalf("legacy event %q %q %q", legacy.name, legacy.id, legacy.data)
		}
		if decoded, err = decodeLegacy(to.Channel, legacy.data); err != nil {
			t.Fatalf("decode %q: %v", legacy.data, err)
		}
		want.ID, want.Method, want.Mode, want.Timeout = "", "POST", "", 0
		if !utf8.Valid(body) {
			want.Body = nil
		}
		sameWebhook(t, decoded, &want)
	})
}

// crossing reports whether all of headers may cross the relay.
func crossing(headers []Header) bool {
	return checkHeaders(headers) == nil && !slices.ContainsFunc(headers, func(h Header) bool {
		return hopByHop[h.Name] || relaysOwn(h.Name) || h.Name != textproto.CanonicalMIMEHeaderKey(h.Name)
	})
}

// FuzzDecodeWebhook: whatever stands in an event, it is either sound or refused.
func FuzzDecodeWebhook(f *testing.F) {
	for _, body := range payloads() {
		w := pushHook()
		w.Body = body
		f.Add(onlyMessage(f, block(eventOf("github", w).chunk)).data)
	}
	for _, data := range []string{"POST /webhooks/github HTTP/1.1\n\n", "GET http://h/webhooks/github/x?y HTTP/1.1\nContent-Length: 0\nA:b\na:  c\t\n\n", "\n\n"} {
		f.Add([]byte(data))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, legacy := range []bool{false, true} {
			w, err := decodeWebhook("github", testID, data)
			if legacy {
				w, err = decodeLegacy("github", data)
			}
			if err != nil {
				continue
			}
			target, err := parseTarget(w.Path + w.Query)
			if err != nil || target.webhook() != nil || target.Channel != "github" || !isToken(w.Method) || !crossing(w.Headers) || w.Timeout < 0 || w.Timeout > maxResponseTimeout {
				t.Fatalf("%q became %+v", data, w)
			}
			if w.ID = testID; !respond(w.Mode) {
				w.Timeout = 0
			}
			m := onlyMessage(t, block(eventOf("github", w).chunk)) // it goes on as it is
			again, err := decodeWebhook("github", m.id, m.data)
			if err != nil {
				t.Fatalf("decode %q: %v", m.data, err)
			}
			sameWebhook(t, again, w)
		}
	})
}

// TestSizes: the forms of hostile bodies are not much larger than the bodies.
func TestSizes(t *testing.T) {
	const size = 3 << 20
	inBase64 := base64.StdEncoding.EncodedLen(size)
	for piece, most := range map[string]int{ // bytes of the chunk, besides the head
		"a": size, "\x01": size, "\x00": size, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa\n": size + 6*size/30, "\n": inBase64, "a\n": inBase64, "\xff": inBase64, "\r": inBase64,
	} {
		w := pushHook()
		w.Body = bytes.Repeat([]byte(piece), size/len(piece))
		e := eventOf("github", w)
		if foreseen := w.wireSize(isText(w.Body)); len(e.chunk) > most+1<<10 || len(e.wire) > foreseen || foreseen > len(e.wire)+4<<10 {
			t.Errorf("%q: %d bytes are %d on the stream, want %d and a head; %d on the wire, %d foreseen", piece, size, len(e.chunk), most, len(e.wire), foreseen)
		}
	}
}

// FuzzOpenEnvelope feeds what may come over Redis, from another version, which must
// not be misread, or from anybody who can publish there.
func FuzzOpenEnvelope(f *testing.F) {
	sig := Signal{
		Kind: signalReceipt, To: "a", From: "b", Channel: "c", Event: "d", Subscriber: "e", Client: "f", Data: []byte("g"), Round: 3,
		Given: []Given{{"s1", "c1"}, {"s2", ""}},
	}
	e := eventOf("ci", &Webhook{ID: "r-1", Method: "POST", Path: "/x", Mode: modeStatus, Timeout: time.Second})
	huge := []byte{envelopeVersion, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1}
	for _, wire := range [][]byte{sig.encode(), e.wire, e.repeat("r", 2, "s").message(), huge, huge[:1]} {
		for _, version := range []byte{0, 2, envelopeVersion, envelopeVersion + 1, 255} {
			f.Add(append([]byte{version}, wire[1:]...))
		}
	}
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, wire []byte) {
		known := len(wire) > 0 && wire[0] == envelopeVersion
		if e, err := openEvent("ci", wire); err == nil {
			again, err := openEvent("ci", append(e.appendEnvelope(nil), e.chunk...))
			if err != nil || !known || again.ID != e.ID || again.Only != e.Only || again.Mode != e.Mode || again.Holder != e.Holder || again.Round != e.Round ||
				again.Until.IsZero() != e.Until.IsZero() || !bytes.Equal(again.chunk, e.chunk) {
				t.Fatalf("event %+v came back as %+v, %v", e, again, err)
			}
			for n := range min(len(wire)-len(e.chunk), 1000) {
				if _, err := openEvent("ci", wire[:n]); err == nil {
					t.Fatalf("the first %d bytes of an envelope were opened", n)
				}
			}
		}
		// Any strings make the round trip, whatever they hold.
		s := string(wire)
		signals := []Signal{{Kind: s, To: s, From: "x", Channel: s, Subscriber: s, Client: s, Data: []byte(s), Round: len(s), Given: []Given{{s, ""}, {"", s}}}}
		if sig, err := openSignal(wire); err == nil {
			signals = append(signals, sig)
		}
		for _, sig := range signals {
			if again, err := openSignal(sig.encode()); err != nil || len(signals) > 1 && !known || !reflect.DeepEqual(again, sig) {
				t.Fatalf("signal %+v came back as %+v, %v", sig, again, err)
			}
		}
	})
}

func TestEndToEnd(t *testing.T) {
	for _, tc := range []struct{ name, lines, want string }{
		{"sorted by name, values in order", "B: 2\nA: z\nB: 1", "[{A [z]} {B [2 1]}]"},
		{"named in Connection", "Connection: close, X-One ,x-two\nConnection: x-three\nX-One: 1\nX-Two: 2\nX-Three: 3\nX-Four: 4", "[{X-Four [4]}]"},
		{"nothing is named in Connection", "Connection: ,,\nAccept: a", "[{Accept [a]}]"},
		{"the fixed list", "Connection: x\nProxy-Connection: x\nKeep-Alive: x\nTE: x\nTransfer-Encoding: chunked\nUpgrade: h2c\nTrailer: x\nTe-X: 1", "[{Te-X [1]}]"},
		{"more of it", "Proxy-Authenticate: x\nProxy-Authorization: x\nContent-Length: 1\nExpect: 100-continue\nProxy-X: 1", "[{Proxy-X [1]}]"},
		{"the relay's own names", "X-Relay-Event-Id: forged\nx-relay-anything: 1\nX-RELAY-CLIENT: x\nX_Relay_Event_Id: forged\nx_relay-a: 1\nX-Relayed: 1", "[{X-Relayed [1]}]"},
		{"everything else", "Authorization: Bearer t\nCookie: a=b\nX-Forwarded-For: 10.0.0.1\nEmpty:", "[{Authorization [Bearer t]} {Cookie [a=b]} {Empty []} {X-Forwarded-For [10.0.0.1]}]"},
	} {
		in := headersOf(tc.lines)
		in["No-Values"] = nil
		if got := fmt.Sprint(endToEnd(in)); got != tc.want {
			t.Errorf("%s: got %s, want %s", tc.name, got, tc.want)
		}
	}
}

var pathCases = []struct {
	path string
	ok   bool
}{
	{"/", true}, {"/a", true}, {"/a/", true}, {"//a//", true}, {"/a%2Fb", true}, {"/a%2f%2Fb", true}, {"/%25", true}, {"/a;v=1/b", true},
	{"/...", true}, {"/.a", true}, {"/a.", true}, {"/..a", true}, {"/a..", true}, {"/.well-known/x", true}, {"/a%20b", true}, {"/\xe9%e9", true},
	{"/%252e%252e/x", true}, {"/a..;x/b", true}, {"/a?b", true}, {"/@evil", true}, {"/http://evil/", true}, {"/%40", true}, {"/:80", true},
	{"", false}, {"a", false}, {"?x", false}, {"*", false}, {"http://h/", false},
	{"/..", false}, {"/.", false}, {"/../x", false}, {"/a/../b", false}, {"/a/./b", false}, {"/a/..", false}, {"/a//../b", false},
	{"/%2e%2e/x", false}, {"/%2E./x", false}, {"/.%2e", false}, {"/%2e", false}, {"/a%2f..%2fb", false}, {"/a%2F%2e%2E", false}, {"/..%2fx", false},
	{"/..;/x", false}, {"/..;a=b/x", false}, {"/.;/x", false}, {"/..%3bx/y", false}, {"/%2e%2e;x", false}, {"/a%2f..;b", false},
	{"/\\", false}, {"/a\\..\\b", false}, {"/%5c", false}, {"/a%5C..%5Cb", false},
	{"/\x00", false}, {"/%00", false}, {"/a\r\nb", false}, {"/%0d%0a", false}, {"/%0A", false}, {"/\t", false}, {"/%7f", false}, {"/\x7f", false}, {"/%1F", false},
	{"/%", false}, {"/%2", false}, {"/%zz", false}, {"/a%2", false},
	{"/..#/a", false}, {"/..%23", false}, {"/..%3fa", false}, {"/.#", false}, {"/a#..", true}, {"/a#b/c", true},
	{"/a b", false}, {"/ HTTP/1.1", false}, // a space ends the request target
}

// parameters are those of a path's segments.
var parameters = regexp.MustCompile(`[;?#][^/]*`)

// confined tells whether path stays below base in every reading that a target
// may give it: as it is, with backslashes for slashes, without parameters.
func confined(base, p string) bool {
	decoded, err := url.PathUnescape(p)
	slashed := strings.ReplaceAll(decoded, `\`, "/")
	for _, reading := range []string{p, decoded, slashed, parameters.ReplaceAllString(slashed, "")} {
		// An empty base is the root, which Clean never leaves: only a dot segment shows there.
		if !below(path.Clean(base+reading), base) || slices.Contains(strings.Split(reading, "/"), "..") {
			return false
		}
	}
	return err == nil
}

// FuzzCheckPath: what is accepted never leaves the prefix it is appended to,
// and fits into a request line; what is known to do so is accepted.
func FuzzCheckPath(f *testing.F) {
	for _, tc := range pathCases {
		if err := checkPath(tc.path); (err == nil) != tc.ok {
			f.Errorf("checkPath(%q) = %v, want accepted %v", tc.path, err, tc.ok)
		}
		f.Add(tc.path)
	}
	f.Fuzz(func(t *testing.T, p string) {
		if checkPath(p) != nil {
			return
		}
		for _, base := range []string{"", "/base", "/a/b"} {
			if !confined(base, p) {
				t.Fatalf("%q leaves %q", p, base)
			}
		}
		if strings.ContainsAny(p, " \t\r\n") {
			t.Fatalf("%q breaks a request line", p)
		}
	})
}

// canary stands where a payload would: no error may quote it.
const canary = "CANARY"

// TestTargets: one reading, byte for byte, of the two forms that are requests to
// us. A client takes webhooks of its own channel alone, whatever a server sends:
// their path is /webhooks/{channel} or below; nothing of what is refused is quoted.
func TestTargets(t *testing.T) {
	decode := func(channel, target, want string) { // want is empty: it is refused
		t.Helper()
		legacy, err2 := decodeLegacy(channel, must(json.Marshal(map[string]string{"originalUrl": target})))
		w, err := decodeWebhook(channel, testID, []byte("POST "+target+" HTTP/1.1\nContent-Length: 0\n\n"))
		if want != "" && err == nil && err2 == nil && w.Path+w.Query == want && legacy.Path+legacy.Query == want {
			return
		}
		if want != "" || err == nil || err2 == nil || strings.Contains(err.Error()+err2.Error(), canary) {
			t.Errorf("%q at %q: decoded %+v, %v, and in the legacy form %+v, %v, want %q", target, channel, w, err, legacy, err2, want)
		}
	}
	for _, tc := range []struct{ target, path, query, kind, channel, tail string }{
		{"/", "/", "", "", "", ""},
		{"/a?", "/a", "?", "a", "", ""},
		{"/?/webhooks/ci?", "/", "?/webhooks/ci?", "", "", ""},
		{"/webhooks", "/webhooks", "", "webhooks", "", ""},
		{"/webhooks/", "/webhooks/", "", "webhooks", "", ""},
		{"/webhooks/ci", "/webhooks/ci", "", "webhooks", "ci", ""},
		{"/webhooks/ci/", "/webhooks/ci/", "", "webhooks", "ci", "/"},
		{"/webhooks/ci?/x", "/webhooks/ci", "?/x", "webhooks", "ci", ""},
		{"/webhooks/ci//a%2Fb?c/d", "/webhooks/ci//a%2Fb", "?c/d", "webhooks", "ci", "//a%2Fb"},
		{"/webhooks/ci/x://h/y", "/webhooks/ci/x://h/y", "", "webhooks", "ci", "/x://h/y"},
		{"/webhooks//ci", "/webhooks//ci", "", "webhooks", "", "/ci"},
		{"//webhooks/ci//?//", "//webhooks/ci//", "?//", "", "webhooks", "/ci//"},
		{"/webhooks%2Fci/x", "/webhooks%2Fci/x", "", "webhooks%2Fci", "x", ""},
		{"/webhooks/c%69/x", "/webhooks/c%69/x", "", "webhooks", "c%69", "/x"},
		{"/webhooks/ci#/x", "/webhooks/ci#/x", "", "webhooks", "ci#", "/x"},
		{"HTTPS://user@h:1/webhooks/x%2Fy?", "/webhooks/x%2Fy", "?", "webhooks", "x%2Fy", ""},
		{"http://h//x", "//x", "", "", "x", ""},
		{"http://[::1]:80/webhooks/ci/x?y://z/w", "/webhooks/ci/x", "?y://z/w", "webhooks", "ci", "/x"},
	} {
		got, err := parseTarget(tc.target)
		if want := (requestTarget{tc.path, tc.query, tc.kind, tc.channel, tc.tail}); err != nil || got != want {
			t.Errorf("parseTarget(%q) = %+v, %v, want %+v", tc.target, got, err, want)
		}
		want := ""
		if tc.kind == "webhooks" && tc.channel == "ci" {
			want = tc.path + tc.query
		}
		decode("ci", tc.target, want)
	}
	for _, target := range []string{ // neither form
		"", "*", "CANARY", "CANARY:443", "webhooks/ci", "?/webhooks/ci", "#/webhooks/ci", "@CANARY/x", "evil/webhooks/ci/x://h/CANARY",
		"http://", "http://CANARY", "http://CANARY?x=/y", "http://h#/x", "http:///webhooks/ci", "http://?/webhooks/ci", "://h/webhooks/ci",
		"http:/webhooks/ci?://h/CANARY", "http:webhooks/ci", "http:/webhooks/ci", "zz:/webhooks/ci?://h/CANARY", "zz://h/webhooks/ci", "ftp://h/webhooks/ci",
		" http://h/webhooks/ci", "http ://h/webhooks/ci", "http%3a//h/webhooks/ci", "http://h\x7f/webhooks/ci", "http://h i/webhooks/ci",
	} {
		if got, err := parseTarget(target); err == nil {
			t.Errorf("parseTarget(%q) = %+v", target, got)
		}
		decode("ci", target, "")
	}
	for _, target := range []string{
		// of another channel, or none
		"/CANARY", "/webhooks/CANARY", "/webhooks/other/CANARY", "/webhooks/cii", "/webhooks/c", "/webhooks/CI", "/webhooks/ci;x", "/%77ebhooks/ci/x", "/Webhooks/ci",
		"//h/webhooks/ci", "/x/webhooks/ci", "/subscribe/ci", "http://h/webhooks/CANARY",
		// out of it
		"/webhooks/other/../ci/x", "/webhooks/ci/../CANARY", "/webhooks/./ci", "http://evil/webhooks/ci/../CANARY", "/webhooks/ci/CANARY\\x",
		// more than a target, or no bytes
		"/webhooks/ci/CANARY\x00", "/webhooks/ci/x?CANARY\x00", "/webhooks/ci/x?a CANARY", "/webhooks/ci/CANARY HTTP/1.1", "/webhooks/ci/x?y HTTP/1.1\r\nCANARY: 1",
		"/webhooks/ci/CANARY\u0100",
	} {
		decode("ci", target, "")
	}
	for _, channel := range []string{"", ".", "..", "*", "c/i", "c%69"} { // no client is of such a channel
		decode(channel, "/webhooks/"+channel+"/x", "")
	}
}

func TestCharacters(t *testing.T) {
	const tokens = "!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" // RFC 9110 section 5.6.2
	const names = "-._~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"             // RFC 3986 section 2.3
	for c := range 256 {
		s := string([]byte{byte(c)})
		back, ok := latin1(string(rune(c)))
		for what, got := range map[string]struct{ is, want bool }{
			"token":        {isToken(s), strings.Contains(tokens, s)},
			"name":         {validName(s), strings.Contains(names, s) && s != "."},
			"header name":  {checkHeaders([]Header{{"X" + s, []string{"v"}}}) == nil, strings.Contains(tokens, s)},
			"header value": {checkHeaders([]Header{{"X", []string{"ok", "a" + s + "b"}}}) == nil, c == '\t' || c >= ' ' && c != 0x7f},
			"code point":   {ok && back == s, true},
		} {
			if got.is != got.want {
				t.Errorf("%q is a %s: %v", s, what, got.is)
			}
		}
	}
	long := strings.Repeat("a", 128)
	if isToken("") || validName("") || validName(long+"a") || !validName(long) || validName("..") || !validName("...") {
		t.Error("what is empty, too long or a dot segment is accepted, or more than that refused")
	}
	if back, ok := latin1("abc\u0100"); ok {
		t.Errorf("a code point that is no byte became %q", back)
	}
}

// TestDecode: whatever a stream says, in whichever form, an event is read as it
// stands, as far as its numbers may be believed, or refused, with a reason that
// quotes none of it.
func TestDecode(t *testing.T) {
	legacy := func(members string) (*Webhook, error) {
		return decodeLegacy("ci", []byte(`{"originalUrl":"http://evil/webhooks/ci/x?y"`+members+`}`))
	}
	many, large := strings.Repeat("X-Many: 1\n", fieldLimit), "X-A: "+strings.Repeat("v", headLimit-200)+"\n"
	for _, tc := range []struct {
		data    string // fields, or members of the legacy form
		mode    string
		timeout time.Duration
		ms      int64
		headers string
		body    string
	}{
		{"", "", 0, 0, "", "x"},
		{"X-Relay-Respond: accept; timeout=5000\n", modeAccept, 5 * time.Second, 0, "", "x"},
		{"X-Relay-Respond: status;timeout=5000\n", modeStatus, 5 * time.Second, 0, "", "x"},
		{"x-relay-respond: response ; timeout=9223372036\nX-Relay-Time: 1700000000000\n", "response ", maxResponseTimeout, 1700000000000, "", "x"},
		{"X-Relay-Respond: response; timeout=2000000000\n", modeResponse, maxResponseTimeout, 0, "", "x"},
		{"X-Relay-Respond: response; timeout=-1\nX-Relay-Time: -5\n", modeResponse, 0, -5, "", "x"},
		{"X-Relay-New: 1\nX-Relay-Respond: later; timeout=x; y\nX-Relay-Time: x\nX-Relay-Body: zip\n", "later", 0, 0, "", "x"},
		{"Transfer-Encoding: chunked\nConnection: close, x-a\nX-A: 1\nUpgrade: h2c\nExpect: 100-continue\n", "", 0, 0, "", "x"}, // of the first hop
		{"A: 1\na: 2\nX-Relay-Client: x\nb:\nc:d\ne:  f \t\n", "", 0, 0, "A: 1\nA: 2\nB:\nC: d\nE: f", "x"},
		{many, "", 0, 0, many, "x"},
		{large, "", 0, 0, large, "x"},

		{`,"path":"/other","query":{"q":"1"},"method":"get"`, "", 0, 0, "", ""},
		{`,"id":5,"method":["G T"],"respond":true,"mode":"status","timeout":1e99,"bodyBase64":"CANARY!","extra":{"a":[null]}`, "", 0, 0, "", ""}, // nobody could be answered
		{`,"headers":null,"body":null,"query":null,"timestamp":null`, "", 0, 0, "", ""},
		{`,"body":"text","bodyBase64":"/w=="`, "", 0, 0, "", "text"},
		{`,"body":"[object Object]","timestamp":5`, "", 0, 5, "", "[object Object]"},
		{`,"headers":{"X-a":"1","x-A":"2"}`, "", 0, 0, "X-A: 1\nX-A: 2", ""},
		{`,"headers":{"x":null}`, "", 0, 0, "X:", ""},
		{`,"headers":{"host":"127.0.0.1:3000","set-cookie":["s1","s2"]}`, "", 0, 0, "Host: 127.0.0.1:3000\nSet-Cookie: s1\nSet-Cookie: s2", ""},
		{`,"headers":{"transfer-encoding":"chunked","content-length":"99","connection":"close","upgrade":"h2c"}`, "", 0, 0, "", ""},
	} {
		want := &Webhook{
			ID: testID, Method: "PUT", Path: "/webhooks/ci/x", Query: "?y", Headers: endToEnd(headersOf(tc.headers)), Body: []byte(tc.body),
			Time: time.UnixMilli(tc.ms), Mode: tc.mode, Timeout: tc.timeout,
		}
		w, err := decodeWebhook("ci", testID, []byte("PUT http://evil/webhooks/ci/x?y HTTP/1.1\n"+tc.data+"content-length:  1 \t\n\nx"))
		if strings.HasPrefix(tc.data, ",") {
			want.ID, want.Method = "", "POST"
			w, err = legacy(tc.data)
		}
		if err != nil {
			t.Errorf("%.200q: %v", tc.data, err)
			continue
		}
		for _, h := range w.Headers {
			slices.Sort(h.Values) // legacy names that differ in case alone have no order
		}
		sameWebhook(t, w, want)
	}

	const line, end = "POST /webhooks/ci/x HTTP/1.1\n", "Content-Length: 0\n\n"
	for _, tc := range []struct {
		decode  func(data string) (*Webhook, error)
		refused []string
	}{
		{func(id string) (*Webhook, error) { return decodeWebhook("ci", id, []byte(line+end)) }, []string{
			"", "CANARY/../x", "CANARY\r", strings.Repeat("x", 129), "..", "CANARY ",
		}},
		{func(data string) (*Webhook, error) { return decodeWebhook("ci", testID, []byte(data)) }, []string{
			// the head
			"", "\n\n\n", line + "Content-Length: 0\n", `{"originalUrl":"/webhooks/ci/CANARY"}` + "\n\n", strings.Repeat("v", 2*headLimit),
			line + many + strings.Repeat("X-A: CANARY\n", ownFields) + end, line + large + large + end,
			// the request line
			"POST /webhooks/ci/CANARY\n" + end, "POST /webhooks/ci/CANARY HTTP/1.0\n" + end, "HTTP/1.1 200 CANARY\n" + end,
			" /webhooks/ci/CANARY HTTP/1.1\n" + end, "G(T /webhooks/ci/CANARY HTTP/1.1\n" + end,
			// the length
			line + "X-A: 1\n\n", line + "Content-Length: 0\n\nCANARY", line + "Content-Length: 12345\n\nCANARY", line + "Content-Length: +6\n\nCANARY",
			line + "Content-Length: 06\n\nCANARY", line + "Content-Length: 6, 6\n\nCANARY", line + "Content-Length: 5\nContent-Length: 6\n\nCANARY",
			line + "X-Relay-Body: base64\nContent-Length: 7\n\nCANARY!",
			// other fields
			line + "CANARY\n" + end, line + "X-CANARY : 1\n" + end, line + "X-A: 1\n CANARY\n" + end, line + ": CANARY\n" + end, line + "X\x00: CANARY\n" + end,
			line + "X-A: CANARY\x00\n" + end, line + "X-A: CANARY\rX-B: 1\n" + end, line + "X-A: CANARY\u2028\n" + end,
		}},
		{func(data string) (*Webhook, error) { return decodeLegacy("ci", []byte(data)) }, []string{
			``, `"CANARY"`, `["CANARY"]`, `null`, `CANARY`, `{"originalUrl":"/webhooks/ci/CANARY`, `{"originalUrl":"/webhooks/ci/x"} {"a":"CANARY"}`,
			strings.Repeat(`{"a":`, 20000) + "1" + strings.Repeat("}", 20000), `{}`, `{"path":"/webhooks/ci/x","originalUrl":"/webhooks/ci/../CANARY"}`,
		}},
		{legacy, []string{
			`,"body":{"CANARY":1}`, `,"timestamp":1e99`, `,"headers":["CANARY"]`, `,"headers":{"x":12345}`, `,"headers":{"x":{"CANARY":"CANARY"}}`,
			`,"headers":{"x":["a",["CANARY"]]}`, `,"headers":{"x":["CANARY"` + strings.Repeat(`,"a"`, fieldLimit) + `]}`, `,"headers":{"x":"` + strings.Repeat("a", headLimit) + `"}`,
			`,"headers":{"a":"CANARY\r\nb: c"}`, `,"headers":{"a":["ok","CANARY\n"]}`, `,"headers":{"a":"CANARY\u0000"}`, `,"headers":{"a":"CANARY\u2028"}`,
			`,"headers":{"a: b\r\nc":"CANARY"}`, `,"headers":{"content-length ":"CANARY"}`, `,"headers":{":path":"CANARY"}`, `,"headers":{"":"CANARY"}`,
		}},
	} {
		for _, data := range tc.refused {
			if w, err := tc.decode(data); err == nil || strings.Contains(err.Error(), canary) || strings.Contains(err.Error(), "12345") {
				t.Errorf("%.200q: decoded %+v, %v", data, w, err)
			}
		}
	}
}

// TestDecodeAllocations: what a client must allocate for an event, and a replica
// to deliver one again.
func TestDecodeAllocations(t *testing.T) {
	e := eventOf("github", pushHook())
	m := onlyMessage(t, block(e.chunk))
	if n := testing.AllocsPerRun(100, func() { decodeWebhook("github", m.id, m.data) }); n > 20 {
		t.Errorf("%v allocations to decode an event", n)
	}
	if n := testing.AllocsPerRun(100, func() { e.repeat(testReplica, 2, "client") }); n > 2 {
		t.Errorf("%v allocations to deliver an event again", n)
	}
}

// reportOf is a as the report on the event id.
func reportOf(id string, a Answer) string {
	var b bytes.Buffer
	a.appendReport(&b, id)
	return b.String()
}

// all wants every report.
func all(string) bool { return true }

// TestReportForm holds the form of reports to the letter; what may be read, from
// another client, too, and is sent on in that form; and what is refused with an
// error that quotes nothing, without reading much more than a report may have.
func TestReportForm(t *testing.T) {
	const of, chunked = "X-Relay-Event-Id: " + testID + "\r\n", "Transfer-Encoding: chunked\r\n\r\n"
	const line, empty = "HTTP/1.1 200 OK\r\n", "Content-Length: 0\r\n\r\n"
	const ok, hi = line + of, line + "Content-Length: 2\r\n" + of + "\r\nhi"
	many := strings.Repeat("X-Many: 1\r\n", fieldLimit)
	reads := map[string]string{ // and what of it is sent on
		strings.ReplaceAll(hi, "\r", ""):                                      hi,
		"HTTP/1.1 201\r\n" + of + empty:                                       "HTTP/1.1 201 Created\r\n" + of + empty,
		"HTTP/1.0 200 OK\r\n" + of + "Content-Length: 2\r\n\r\nhi":            hi,
		ok + chunked + "2\r\nhi\r\n0\r\n\r\n" + ok + empty:                    hi + ok + empty,
		hi + "HTTP/1.1 204 x\r\n" + of + "\r\n" + hi:                          hi + "HTTP/1.1 204 No Content\r\n" + of + "\r\n" + hi,
		line + "x-relay-event-id:" + testID + "\r\ncontent-length: 0\r\n\r\n": ok + empty,
		ok + many + empty: line + many + of + empty,
		ok + "X-A: 1\r\n 2\r\nConnection: x-b\r\nX-B: 3\r\nSet-Cookie: 4\r\n" + empty: line + "X-A: 1 2\r\n" + of + empty, // folded, hop-by-hop
		ok + "X-Relay-Error: timeout\r\nX-Relay-Client: x\r\n" + empty:                "HTTP/1.1 504 Gateway Timeout\r\nX-Relay-Error: timeout\r\n" + of + empty,
	}
	for _, tc := range []struct {
		a    Answer
		form string
	}{
		{Answer{Status: 201, Headers: []Header{{"Content-Type", []string{"text/plain"}}, {"X-Dup", []string{"a", "b\xe9"}}}, Body: []byte("né\x00\r\n\xff")},
			"HTTP/1.1 201 Created\r\nContent-Length: 7\r\nContent-Type: text/plain\r\nX-Dup: a\r\nX-Dup: b\xe9\r\n" + of + "\r\nné\x00\r\n\xff"},
		{Answer{Status: 404}, "HTTP/1.1 404 Not Found\r\n" + of + empty},
		{Answer{Status: 204}, "HTTP/1.1 204 No Content\r\n" + of + "\r\n"},
		{Answer{Status: 304, Headers: []Header{{"Etag", []string{"e"}}}}, "HTTP/1.1 304 Not Modified\r\nEtag: e\r\n" + of + "\r\n"},
		{Answer{Status: 599}, "HTTP/1.1 599 status code 599\r\n" + of + empty},
		{Answer{Err: answerUnreachable}, "HTTP/1.1 502 Bad Gateway\r\nX-Relay-Error: unreachable\r\n" + of + empty},
		{Answer{Err: answerTimeout}, "HTTP/1.1 504 Gateway Timeout\r\nX-Relay-Error: timeout\r\n" + of + empty},
		{Answer{Err: answerTaken}, "HTTP/1.1 202 Accepted\r\nX-Relay-Error: taken\r\n" + of + empty},
		{Answer{Status: 200, Body: make([]byte, answerLimit)}, line + "Content-Length: 1048576\r\n" + of + "\r\n" + strings.Repeat("\x00", answerLimit)},
	} {
		if data := reportOf(testID, tc.a); data != tc.form {
			t.Errorf("report %.200q, want %.200q", data, tc.form)
		}
		reads[tc.form] = tc.form
	}
	read := func(data io.Reader, wanted bool) (got string, err error) {
		for list := newReports(data); ; {
			id, a, err := list.next(func(string) bool { return wanted })
			if err != nil {
				if strings.Contains(err.Error(), canary) {
					t.Errorf("error quotes the report: %v", err)
				}
				return got, err
			}
			got += reportOf(id, a)
		}
	}
	for data, want := range reads {
		if got, err := read(iotest.HalfReader(strings.NewReader(data+data)), true); err != io.EOF || got != want+want {
			t.Errorf("of %.200q was read %.200q, %v, want %.200q", data, got, err, want)
		}
		if _, err := read(strings.NewReader(data), false); err != io.EOF {
			t.Errorf("of %.200q, which nobody wants: %v", data, err)
		}
	}
	if got, err := read(strings.NewReader(hi+ok), true); err == io.EOF || got != hi {
		t.Errorf("of a good one and one that is cut was read %q, %v", got, err)
	}
	refused := []string{
		// no response
		`{"status":200,"body":"CANARY"}`, "POST /CANARY HTTP/1.1\r\n" + of + empty,
		// the id
		line + empty, line + "X-Relay-Event-Id: CANARY\r\n" + empty,
		strings.Replace(ok, testID, testID+"A", 1) + empty, strings.Replace(ok, testID, strings.ToLower(testID), 1) + empty,
		// the length
		ok + "\r\nCANARY", ok + "Connection: close\r\n\r\nCANARY", ok + "Transfer-Encoding: identity\r\n\r\nCANARY", ok + "Content-Length: -6\r\n\r\nCANARY",
		ok + "Content-Length: 6\r\nContent-Length: 7\r\n\r\nCANARY", ok + "Content-Length: 1048577\r\n\r\n" + strings.Repeat("x", answerLimit+1),
		ok + chunked + "100001\r\n" + strings.Repeat("x", answerLimit+1) + "\r\n0\r\n\r\n",
		// cut
		ok, ok + "Content-Length: 9\r\n\r\nCANARY", ok + chunked + "9\r\nCANARY",
		// other fields
		ok + "X-Relay-Error: CANARY\r\n" + empty, ok + "X-A: CANARY\x00\r\n" + empty, ok + "X Y: CANARY\r\n" + empty,
		ok + many + strings.Repeat("X-A: CANARY\r\n", ownFields) + empty,
	}
	for _, status := range []string{"101", "199", "600", "999", "-20"} {
		refused = append(refused, "HTTP/1.1 "+status+" CANARY\r\n"+of+empty)
	}
	for _, data := range refused {
		if got, err := read(strings.NewReader(data), true); err == io.EOF || got != "" {
			t.Errorf("of %.200q was read %.80q, %v", data, got, err)
		}
		read(strings.NewReader(data), false)
	}
	for _, tc := range []struct {
		start, piece string
		limit        int
	}{
		{"HTTP/1.1 200 ", "x", headLimit},
		{ok + "X-A: ", "x", headLimit},
		{ok, "X-A: x\r\n", headLimit},
		{ok, "X-A: " + strings.Repeat("v", 1024) + "\r\n", headLimit}, // few fields
		{ok + chunked + "ffffffff\r\n", "x", answerLimit + headLimit},
		{ok + chunked, "1\r\nx\r\n", answerLimit + headLimit},
		{ok + chunked + "0\r\n", "X-A: x\r\n", answerLimit + headLimit},
	} {
		source := strings.NewReader(tc.start + strings.Repeat(tc.piece, 4<<20/len(tc.piece)))
		got, err := read(source, true)
		if taken := int(source.Size()) - source.Len(); got != "" || taken > tc.limit+8<<10 {
			t.Errorf("%q and %.20q for ever: read %.20q, %v after %d bytes", tc.start, tc.piece, got, err, taken)
		}
	}
	// The best of several answers is the one nearest to success.
	order := []Answer{{Status: 204}, {Status: 302}, {Status: 404}, {Status: 503}, {Status: 504, Err: answerTimeout}, {Status: 502, Err: answerUnreachable}}
	for i, a := range order[1:] {
		if order[i].rank() >= a.rank() {
			t.Errorf("%+v does not beat %+v", order[i], a)
		}
	}
}

// FuzzReports: whatever a client reports is read without a panic and within
// bounds, and what comes out of it is an answer that can be passed on.
func FuzzReports(f *testing.F) {
	for _, a := range []Answer{
		{Status: 200, Headers: []Header{{"Content-Type", []string{"text/plain"}}}, Body: []byte(everyByte)},
		{Status: 204}, {Status: 304}, {Status: 599}, {Err: answerTimeout}, {Err: answerUnreachable}, {Err: answerTaken},
	} {
		f.Add([]byte(reportOf(testID, a)))
		f.Add([]byte(reportOf(testID, a) + reportOf(testID, a)))
	}
	f.Add([]byte("HTTP/1.1 200 OK\r\nX-Relay-Event-Id: " + testID + "\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-T: 1\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nX-Relay-Event-Id: " + testID + "\r\nContent-Length: 0\r\n\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		list := newReports(bytes.NewReader(data))
		for id, a, err := list.next(all); err == nil; id, a, err = list.next(all) {
			known := slices.Contains([]string{"", answerUnreachable, answerTimeout, answerTaken}, a.Err)
			cookies := slices.ContainsFunc(a.Headers, func(h Header) bool { return h.Name == "Set-Cookie" })
			if replicaOf(id) == "" || a.Status < 200 || a.Status > 599 || len(a.Body) > answerLimit || !crossing(a.Headers) || cookies || !known {
				t.Fatalf("%q became %q %+v", data, id, a)
			}
			// It goes on to another replica as it is.
			id2, b, err := newReports(strings.NewReader(reportOf(id, a))).next(all)
			if err != nil || id2 != id || b.rank() != a.rank() || reportOf(id2, b) != reportOf(id, a) {
				t.Fatalf("%q %+v goes on as %q %+v, %v", id, a, id2, b, err)
			}
		}
	})
}

func TestIDs(t *testing.T) {
	for range 100 {
		replica := newReplica()
		a, b := newID(replica), newID(replica)
		if a == b || !validName(a) || replicaOf(a) != replica || replicaOf(b) != replica {
			t.Fatalf("ids %q and %q of %q", a, b, replica)
		}
	}
	// Nothing else is of any replica, above all of none with a name that means something else.
	good := newID(testReplica)
	for _, id := range []string{
		"", "-", "x", "all", "all-" + good, "all-" + good[14:], "@all-" + good[14:], testReplica, testReplica + "-", good[14:], good[:len(good)-1], good + "A",
		strings.ToLower(good), strings.Replace(good, "-", "_", 1), strings.Replace(good, "-", "A", 1), good[:20] + "-" + good[21:], good[:20] + "1" + good[21:],
		good[:20] + "8" + good[21:], good[:20] + "\x00" + good[21:], good[:20] + "/" + good[21:], "@" + good[1:], good[:12] + "--" + good[14:], "elsewhere-" + good,
	} {
		if replica := replicaOf(id); replica != "" {
			t.Errorf("replicaOf(%q) = %q", id, replica)
		}
	}
}

// TestBackoff: growth to the cap, jitter within its half, and no overflow
// however long the other side is away.
func TestBackoff(t *testing.T) {
	plain := Backoff{Initial: 100 * time.Millisecond, Max: time.Second, Factor: 3}
	for i, want := range []time.Duration{100, 300, 900, 1000, 1000, 100} {
		if i == 5 {
			plain.Reset()
		}
		if got := plain.Next(); got != want*time.Millisecond {
			t.Errorf("try %d: %v, want %v", i, got, want*time.Millisecond)
		}
	}
	for _, b := range []Backoff{
		{Initial: time.Second, Max: 30 * time.Second, Factor: 2, Jitter: true},
		{Initial: time.Millisecond, Max: maxDuration, Factor: 100, Jitter: true},
		{Initial: time.Minute, Max: time.Second, Factor: 1, Jitter: true},
	} {
		low, high := 1.0, 0.0
		for i := range 5000 {
			share := float64(b.Next()) / math.Min(float64(b.Initial)*math.Pow(b.Factor, float64(i)), float64(b.Max))
			low, high = min(low, share), max(high, share)
		}
		if low < 0.499 || low > 0.6 || high < 0.9 || high > 1.001 {
			t.Errorf("%+v: from %v to %v of the delay", b, low, high)
		}
	}
}

// The hub.

var wide = Limits{Subscribers: 1000, PerAddress: 1000, Buffer: 1 << 20}

// newHub is a hub that keeps nothing once all have left it at the end of the test.
func newHub(t testing.TB, limits Limits) *Hub {
	h := &Hub{Limits: limits}
	t.Cleanup(func() {
		leaveAll(h, errPeerGone)
		empty(t, h)
	})
	return h
}

// joined is a subscriber that the hub took. Its Write only says that it was
// called; the test itself calls Take.
func joined(t testing.TB, h *Hub, channel string) *Subscriber {
	t.Helper()
	s := &Subscriber{Channel: channel, Addr: netip.MustParseAddr("192.0.2.1"), Write: func() {}}
	if err := h.Subscribe(s); err != nil {
		t.Fatal(err)
	}
	return s
}

// sized is an event whose chunk has n bytes.
func sized(channel string, n int) *Event {
	e := &Event{ID: strconv.Itoa(n), Channel: channel, chunk: make([]byte, n)}
	e.uses.Store(1)
	return e
}

// took is the ids that Take hands out, until its queue is empty.
func took(s *Subscriber) (ids []string) {
	for batch, _ := s.Take(nil); len(batch) > 0; batch, _ = s.Take(batch) {
		for _, e := range batch {
			ids = append(ids, e.ID)
		}
	}
	return ids
}

// empty fails unless nothing at all is kept.
func empty(t testing.TB, h *Hub) {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.channels) > 0 || len(h.addresses) > 0 || h.total != 0 {
		t.Errorf("hub keeps %d channels, %d addresses, counts %d subscribers", len(h.channels), len(h.addresses), h.total)
	}
}

// TestHubReceipt: every event that a replica takes makes one receipt for its
// holder, which says to whom it was given; an event may be for one client, or for
// those who can report.
func TestHubReceipt(t *testing.T) {
	var signals []Signal
	h := newHub(t, wide)
	h.OnSignal = func(s Signal) { signals = append(signals, s) }
	everybody := []*Subscriber{{Client: "c", Responds: true}, {Client: "d", Responds: true}, {Client: "e"}, {}}
	var all []Given
	for _, s := range everybody {
		s.Channel, s.Write = "a", func() {}
		if err := h.Subscribe(s); err != nil {
			t.Fatal(err)
		}
		all = append(all, Given{s.ID, s.Client})
	}
	all[2].Client = "" // it cannot report
	other := joined(t, h, "other")
	for i, tc := range []struct {
		only string
		want []Given
	}{
		{"", all}, {onlyReporters, all[:2]}, {"c", all[:1]}, {"d", all[1:2]}, {"e", nil}, {"x", nil}, {all[0].Subscriber, nil},
	} {
		e := sized("a", i+1)
		e.Holder, e.Round, e.Only = "holder", 3, tc.only
		signals = nil
		if n, err := h.Publish(t.Context(), e); n != 1 || err != nil || len(signals) != 1 {
			t.Fatalf("for %q: %d replicas, %v, signals %+v", tc.only, n, err, signals)
		}
		got := signals[0]
		slices.SortFunc(got.Given, func(a, b Given) int { return slices.Index(all, a) - slices.Index(all, b) })
		if want := (Signal{Kind: signalReceipt, To: "holder", From: "holder", Event: e.ID, Round: 3, Given: tc.want}); !reflect.DeepEqual(got, want) {
			t.Errorf("for %q: signal %+v, want %+v", tc.only, got, want)
		}
		for i, s := range everybody {
			if ids := took(s); len(ids) > 0 != slices.Contains(tc.want, all[i]) {
				t.Errorf("for %q: %+v got %q", tc.only, s.Client, ids)
			}
		}
	}
	signals = nil
	nobody, err := h.Publish(t.Context(), sized("nobody's", 1))
	itself, err2 := h.Send(t.Context(), Signal{Kind: signalReady})
	h.Tell(Signal{Kind: signalLeft})
	if err != nil || err2 != nil || nobody != 0 || itself != 1 || len(signals) != 2 || took(other) != nil {
		t.Errorf("%d took what is for nobody, %d a signal: %v, %v, signals %+v", nobody, itself, err, err2, signals)
	}
}

// TestHubBounds: bytes bound a queue, and a batch that is being written counts
// until the next Take. Who is full is not given an event and stays; with half of
// its space free it says so, once.
func TestHubBounds(t *testing.T) {
	h := newHub(t, Limits{Subscribers: 9, PerAddress: 9, Buffer: 100})
	slow, quick := joined(t, h, "a"), joined(t, h, "a")
	deliver := func(size, want int, full int64) {
		t.Helper()
		if given := h.Deliver(sized("a", size)); len(given) != want || h.Full.Load() != full {
			t.Errorf("%d bytes were given to %d and found %d full, want %d and %d", size, len(given), h.Full.Load(), want, full)
		}
	}
	take := func(want int, space bool, bytes int64) {
		t.Helper()
		if batch, got := quick.Take(nil); len(batch) != want || got != space || quick.bytes != bytes {
			t.Errorf("took %d, space: %t, and %d bytes count, want %d, %t, %d", len(batch), got, quick.bytes, want, space, bytes)
		}
	}
	deliver(5000, 2, 0) // an empty queue takes any one event
	take(1, false, 5000)
	take(0, false, 0)
	deliver(60, 1, 1)
	deliver(40, 1, 2) // full to the byte
	deliver(1, 0, 4)
	take(2, false, 100) // what is being written counts
	deliver(1, 0, 6)
	take(0, true, 0)
	take(0, false, 0) // it was said
	deliver(30, 1, 7)
	deliver(71, 0, 9)
	take(1, true, 30) // with half of the space free, though something is queued
	take(0, false, 0)
	if h.Reason(slow) != nil || h.Reason(quick) != nil || h.Evicted.Load() != 0 {
		t.Errorf("who is full was evicted: %v, %v", h.Reason(slow), h.Reason(quick))
	}
	h.Leave(slow, errPeerGone)
	for range 100 { // heartbeats are the relay's own, and nobody's backlog
		h.Push(quick, heartbeatEvent)
	}
	deliver(5000, 1, 9)
	take(101, false, 5000)
}

// TestHeldLeavesSpace: although what is held takes the whole budget, a subscriber
// with nothing queued is given one event, and the next when it has taken that.
func TestHeldLeavesSpace(t *testing.T) {
	h := newHub(t, wide)
	h.Budget = &Budget{Limit: 1000}
	held, _ := h.Budget.claim("a", 500)
	h.Budget.claim("b", 500)
	s := joined(t, h, "a")
	for n := 1; n <= 3; n++ {
		e := sized("a", n)
		first, second := h.Deliver(e), h.Deliver(sized("a", 100+n))
		missed := s.missed
		if got := took(s); len(first) != 1 || second != nil || !missed || !slices.Equal(got, []string{strconv.Itoa(n)}) {
			t.Errorf("event %d was given to %v, a second one to %v; missed: %t, took %q", n, first, second, missed, got)
		}
		e.release() // its maker's
		e.release() // the stream's
	}
	held.end()
	if used := h.Budget.Used(); used != 500 {
		t.Errorf("%d bytes are used in the end", used)
	}
}

// TestHubTake: a batch ends at the burst, but never before its first event; an event
// whose sender has been answered leaves the queue without being written.
func TestHubTake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHub(t, Limits{Subscribers: 9, PerAddress: 9, Buffer: 1 << 30})
		s := joined(t, h, "a")
		begin := time.Now()
		for _, tc := range []struct {
			size int
			left time.Duration
		}{{burst + 1, 0}, {3, time.Second}, {burst / 2, time.Minute}, {burst / 2, 0}, {1, 0}, {burst, time.Minute}, {2, 0}, {4, time.Second}} {
			e := sized("a", tc.size)
			if tc.left > 0 {
				e.Until = begin.Add(tc.left)
			}
			h.Deliver(e)
		}
		time.Sleep(2 * time.Second)
		var batch []*Event
		for _, want := range [][]int{{burst + 1}, {burst / 2, burst / 2}, {1}, {burst}, {2}, nil} {
			var sizes []int
			batch, _ = s.Take(batch)
			for _, e := range batch {
				sizes = append(sizes, len(e.chunk))
			}
			if !slices.Equal(sizes, want) {
				t.Errorf("batch %v, want %v", sizes, want)
			}
		}
		if s.bytes != 0 || s.batch != 0 || len(s.queue) != 0 {
			t.Errorf("%d and %d bytes are counted in the end, queue %v", s.bytes, s.batch, s.queue)
		}
	})
}

// TestHubLimits: subscribers are bounded in total, and by address, which in IPv6 is
// a /64; one channel has at most half of all, so that who has its token does not
// keep out the others. Who leaves makes space once, and who is refused leaves
// nothing.
func TestHubLimits(t *testing.T) {
	if err := new(Hub).Subscribe(&Subscriber{}); err == nil {
		t.Error("a hub without limits took a subscriber")
	}
	type try struct {
		addr, channel string
		want          error
	}
	const one, two, six, mapped = "192.0.2.1", "192.0.2.2", "2001:db8::1", "::ffff:192.0.2.1"
	for _, tc := range []struct {
		subscribers, perAddress int
		tries                   []try
	}{
		{1, 9, []try{{one, "a", nil}, {two, "c", errSubscribers}}},
		{2, 9, []try{{one, "a", nil}, {two, "a", errPerChannel}, {one, "b", nil}, {two, "a", errSubscribers}, {two, "c", errSubscribers}}},
		{3, 9, []try{{one, "a", nil}, {one, "a", nil}, {two, "a", errPerChannel}, {two, "b", nil}, {two, "c", errSubscribers}}},
		{9, 2, []try{{one, "a", nil}, {mapped, "b", nil}, {two, "a", nil}, {one, "c", errPerAddress}, {mapped, "c", errPerAddress}}},
		{9, 2, []try{
			{six, "a", nil}, {"2001:db8::2", "b", nil}, {"2001:db8::ffff:ffff:ffff:ffff", "c", errPerAddress}, {six + "%eth0", "c", errPerAddress},
			{"2001:db8:0:1::1", "a", nil}, {"2001:db8:0:1::1", "b", nil}, {"2001:db8:0:1::1", "c", errPerAddress},
		}},
	} {
		h := newHub(t, Limits{Subscribers: tc.subscribers, PerAddress: tc.perAddress, Buffer: 1})
		var in []*Subscriber
		channels := map[string]bool{}
		enter := func(try try) {
			s := &Subscriber{Channel: try.channel, Addr: netip.MustParseAddr(try.addr)}
			err := h.Subscribe(s)
			if err != try.want {
				t.Errorf("%+v, with %d in it: %+v ends in %v", h.Limits, len(in), try, err)
			}
			if err == nil {
				in, channels[s.Channel] = append(in, s), true
			}
			if n, c := h.Count(); n != len(in) || c != len(channels) || len(h.Channels()) != c || !h.Wants("a") || h.Wants("c") {
				t.Errorf("%d subscribers of %d channels, %q, want %d of %v", n, c, h.Channels(), len(in), channels)
			}
		}
		for _, try := range tc.tries {
			enter(try)
		}
		h.Leave(in[0], errPeerGone)
		h.Leave(in[0], errShutdown) // the writer and the reader of a stream both say so
		if reason := h.Reason(in[0]); reason != errPeerGone {
			t.Errorf("reason %v, want the first", reason)
		}
		in = in[1:]
		enter(tc.tries[0])
		last := tc.tries[len(tc.tries)-1]
		last.addr = tc.tries[0].addr
		enter(last)
	}
}

// TestHubLive: a subscriber of a hub of its own is live at once, behind a bus once
// its channel is confirmed; the bus hears of the first and the last subscriber.
func TestHubLive(t *testing.T) {
	if s := joined(t, newHub(t, wide), "a"); !isClosed(s.Live) {
		t.Error("a hub of its own waits for a bus")
	}
	var watched string
	h := newHub(t, wide)
	h.Watch = func(channel string) { watched += channel }
	var all []*Subscriber
	check := func(when, wantWatched string, want ...bool) {
		t.Helper()
		var live []bool
		for _, s := range all {
			live = append(live, isClosed(s.Live))
		}
		if !slices.Equal(live, want) || watched != wantWatched {
			t.Errorf("%s: live are %t, want %t; watched %q, want %q", when, live, want, watched, wantWatched)
		}
	}
	join := func() { all = append(all, joined(t, h, "a")) }
	join()
	h.Confirm("b") // nobody's, or of a moment ago
	check("before the bus confirmed", "a", false)
	if given := h.Deliver(sized("a", 1)); len(given) != 1 {
		t.Error("events queue from the beginning")
	}
	h.Confirm("a")
	h.Confirm("a")
	join()
	check("a channel that is live is live for all", "a", true, true)
	h.Suspend()
	join()
	check("an outage takes no ready back", "a", true, true, false)
	h.Confirm("a")
	check("after the outage", "a", true, true, true)
	leaveAll(h, errPeerGone)
	check("after the last one", "aa", true, true, true)
	join()
	check("a channel that was given up", "aaa", true, true, true, false)
}

// TestHubWrites: whoever queues an event while nobody writes starts the
// writer, and only then; a stream ends at once, or with its queue.
func TestHubWrites(t *testing.T) {
	h := newHub(t, wide)
	var writes, aborts atomic.Int32
	abort := func() { aborts.Add(1) }
	s := joined(t, h, "a")
	s.Write = func() { writes.Add(1) }
	h.Attach(s, abort)
	check := func(what string, wantWrites, wantAborts int32, want error) {
		t.Helper()
		if s.Writers.Wait(); writes.Load() != wantWrites || aborts.Load() != wantAborts || h.Reason(s) != want {
			t.Errorf("%s: %d writers, %d aborts, %v, want %d, %d, %v", what, writes.Load(), aborts.Load(), h.Reason(s), wantWrites, wantAborts, want)
		}
	}
	h.Deliver(sized("a", 1))
	check("before the stream has begun", 0, 0, nil)
	took(s)
	h.Deliver(sized("a", 2))
	h.Deliver(sized("a", 3))
	check("two events", 1, 0, nil)
	h.Finish(s, errStreamAge)
	h.Deliver(sized("a", 4))
	if !h.Push(s, heartbeatEvent) {
		t.Error("no heartbeat for a stream that finishes")
	}
	check("before its queue was written", 1, 0, nil)
	if got := took(s); !slices.Equal(got, []string{"2", "3", "4", ""}) {
		t.Errorf("took %q", got)
	}
	check("at the end of its queue", 1, 1, errStreamAge)
	if h.Push(s, heartbeatEvent) || h.Deliver(sized("a", 5)) != nil {
		t.Error("something is queued for a stream that has ended")
	}
	h.Leave(s, errShutdown)
	check("after the end", 1, 1, errStreamAge)

	s = joined(t, h, "a") // which has nothing to write
	took(s)
	h.Finish(s, errShutdown)
	h.Attach(s, abort)
	check("connected when it has ended", 1, 2, errShutdown)
	s = joined(t, h, "a")
	h.Deliver(sized("a", 6))
	if h.Leave(s, errPeerGone); took(s) != nil {
		t.Error("who has left goes on writing")
	}
	if list := h.Subscribers(); len(list) != 0 {
		t.Errorf("%d subscribers listed", len(list))
	}
}

// TestStuck: a probe must tell a stuck hub, or server, from a busy one, and not hang
// with it.
func TestStuck(t *testing.T) {
	h, s := &Hub{}, &Server{}
	for mu, alive := range map[*sync.Mutex]func(context.Context) error{&h.mu: h.Check, &s.mu: s.Alive} {
		synctest.Test(t, func(t *testing.T) {
			check := func() error {
				ctx, cancel := context.WithTimeout(t.Context(), checkTimeout)
				defer cancel()
				return alive(ctx)
			}
			mu.Lock()
			time.AfterFunc(time.Second, mu.Unlock)
			if err := check(); err != nil {
				t.Errorf("busy: %v", err)
			}
			mu.Lock()
			began := time.Now()
			if err := check(); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > checkTimeout+time.Second {
				t.Errorf("stuck: %v after %v", err, time.Since(began))
			}
		})
	}
}

// TestEventsKeepWhatTheyCount makes large events give their memory back and
// small ones be kept: budgets count the bytes that are used.
func TestEventsKeepWhatTheyCount(t *testing.T) {
	for _, mode := range []string{modeAccept, modeStatus} {
		used, counted := 0, 0
		for range 1000 {
			eventOf("a", &Webhook{ID: "x", Method: "POST", Path: "/", Body: bytes.Repeat([]byte("a"), 40<<10)}).release()
			e := eventOf("b", &Webhook{ID: "x", Method: "POST", Path: "/", Body: []byte("{}"), Mode: mode})
			used, counted = used+cap(e.wire), counted+len(e.wire)
		}
		if used > 8*counted { // mostly space for the head of an event
			t.Errorf("%s: %d bytes are used, %d counted", mode, used, counted)
		}
	}
}

// TestHubHammer lets everything happen at once. Each channel has one
// publisher, so its subscribers must see its numbers in their order, and no more
// than was given; of who has taken everything nothing is counted.
func TestHubHammer(t *testing.T) {
	h := newHub(t, Limits{Subscribers: 50, PerAddress: 40, Buffer: 4000})
	h.Watch = func(string) {}
	channels := []string{"a", "b", "c"}
	var revoked, given, seen atomic.Int64
	soft := func() bool { return revoked.Load() == 0 || h.Full.Load() == 0 || seen.Load() < 1000 }
	var publishers, subscribers sync.WaitGroup
	deadline := time.Now().Add(patience)
	for _, channel := range channels {
		publishers.Go(func() {
			for n := 0; n < 3000 || soft() && time.Now().Before(deadline); n++ {
				e := sized(channel, 1+mathrand.N(200))
				e.ID = strconv.Itoa(n)
				given.Add(int64(len(h.Deliver(e))))
				e.release()
				if n%10 == 0 {
					h.Suspend()
					h.Confirm(channel)
				}
				if list := h.Subscribers(); n%20 == 0 && len(list) > 0 {
					h.Leave(list[0], errRevoked)
				}
			}
		})
	}
	published := make(chan struct{})
	subscribe := func(addr netip.Addr) {
		s := &Subscriber{Channel: channels[mathrand.N(len(channels))], Addr: addr}
		last, under := -1, atomic.Int32{}
		s.Write = func() {
			for batch, _ := s.Take(nil); len(batch) > 0; batch, _ = s.Take(batch) {
				if under.Add(1) > 1 {
					t.Error("two writers at once")
				}
				for _, e := range batch {
					n, _ := strconv.Atoi(e.ID)
					if n <= last {
						t.Errorf("%d came after %d", n, last)
					}
					last = n
					seen.Add(1)
					e.release()
				}
				if mathrand.N(50) == 0 {
					time.Sleep(time.Millisecond) // a slow network
				}
				under.Add(-1)
			}
		}
		if h.Subscribe(s) != nil {
			runtime.Gosched() // the limits are meant to be met
			return
		}
		gone := make(chan struct{})
		h.Attach(s, func() { close(gone) })
		s.Write()
		select {
		case <-gone:
		case <-time.After(time.Duration(mathrand.N(20)) * time.Millisecond):
		}
		h.Finish(s, errStreamAge)
		<-gone
		if s.Writers.Wait(); h.Reason(s) == errRevoked {
			revoked.Add(1)
		} else if s.bytes != 0 {
			t.Errorf("%d bytes are counted in the end", s.bytes)
		}
	}
	for i := range 60 {
		subscribers.Go(func() {
			for !isClosed(published) {
				subscribe(netip.AddrFrom4([4]byte{192, 0, 2, byte(i % 2)}))
			}
		})
	}
	publishers.Wait()
	close(published)
	subscribers.Wait()
	empty(t, h)
	if n := h.Delivered.Load(); soft() || n != given.Load() || seen.Load() > n {
		t.Errorf("%d revoked, %d found full; %d counted, %d given, %d seen", revoked.Load(), h.Full.Load(), n, given.Load(), seen.Load())
	}
}

// Benchmarks.

// pushHook is a GitHub push of 10 KiB as it was captured.
func pushHook() *Webhook {
	return &Webhook{
		ID: newID(testReplica), Method: "POST", Path: "/webhooks/github/push", Query: "?x=1", Body: githubBody(10 << 10), Time: wireTime,
		Headers: endToEnd(headersOf("Accept: */*\nContent-Type: application/json\nUser-Agent: GitHub-Hookshot/044aadd\nX-GitHub-Delivery: 72d3162e-cc78-11e3-81ab-4c9367dc0958\nX-GitHub-Event: push\nX-GitHub-Hook-ID: 292430182\nX-Hub-Signature-256: sha256=d57c68ca6f92289e6987922ff26938930f6e66a2d161ef06abdf1859230aa23c")),
	}
}

// plainHook is a webhook as a program would write it that uses JSON.
type plainHook struct {
	ID          string            `json:"id"`
	Method      string            `json:"method"`
	OriginalURL string            `json:"originalUrl"`
	Path        string            `json:"path"`
	Query       map[string]string `json:"query"`
	Headers     map[string]string `json:"headers"`
	Body        string            `json:"body"`
	Timestamp   int64             `json:"timestamp"`
}

func times(n int, f func()) func() {
	return func() {
		for range n {
			f()
		}
	}
}

// plainOf is w as such a program would have it.
func plainOf(w *Webhook) plainHook {
	plain := plainHook{ID: w.ID, Method: w.Method}
	json.Unmarshal(w.legacyJSON(), &plain)
	return plain
}

// BenchmarkEncode: the form of an event, beside encoding/json: 1.4 and 18 µs.
func BenchmarkEncode(b *testing.B) {
	w := pushHook()
	plain := plainOf(w)
	duel(b, "event", 200, times(200, func() { eventOf("github", w).release() }), times(200, func() { json.Marshal(plain) }))
}

// BenchmarkDecode: one event as the client reads it, beside encoding/json
// alone, without the checks: 4.3 and 56 µs.
func BenchmarkDecode(b *testing.B) {
	e := eventOf("github", pushHook())
	m, legacy := onlyMessage(b, block(e.chunk)), onlyMessage(b, block(e.chunkFor(false)))
	duel(b, "event", 100, times(100, func() {
		if _, err := decodeWebhook("github", m.id, m.data); err != nil {
			b.Fatal(err)
		}
	}), times(100, func() {
		var plain plainHook
		json.Unmarshal(legacy.data, &plain)
	}))
}

// BenchmarkHubPublish: one event to 1 and to 500 subscribers, who take it,
// beside a send to as many Go channels.
func BenchmarkHubPublish(b *testing.B) {
	for _, n := range []int{1, 500} {
		b.Run(fmt.Sprintf("subscribers=%d", n), func(b *testing.B) {
			h := newHub(b, wide)
			subscribers := make([]*Subscriber, n)
			queues := make([]chan *Event, n)
			for i := range n {
				subscribers[i], queues[i] = joined(b, h, "a"), make(chan *Event, 1)
			}
			e := sized("a", 1024)
			h.OnSignal = func(Signal) {}
			var batch []*Event
			duel(b, "event", 100, times(100, func() {
				h.Publish(context.Background(), e)
				for _, s := range subscribers {
					batch, _ = s.Take(batch)
				}
			}), times(100, func() {
				for _, q := range queues {
					q <- e
				}
				for _, q := range queues {
					<-q
				}
			}))
		})
	}
}
