// A constant answer from Go's net/http: what a compiled server gives without any work.
package main

import (
	"net/http"
	"os"
)

const answer = `{"score":7,"badge_color":"green","completed_sessions":8,"no_shows":1,` +
	`"cache_timestamp":"2026-11-22T16:39:00.123456Z"}`

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte(answer))
	})
	if err := http.ListenAndServe("127.0.0.1:"+os.Args[1], nil); err != nil {
		panic(err)
	}
}
